"""The results as Markdown."""

from typing import Any

# Mean KL divergence, nats a token, below which two implementations say the same.
SAME = 1e-4
# Between log-probabilities of tools that give those of the text's own tokens only.
SAME_LOGS = 1e-3
CARRIED = """Models, all of them made from what the repository carries (8 M Llama, also as a Qwen2
with seeded biases and as a Qwen3 with seeded norms of queries and keys; 4 M OPT):"""
Row = dict[str, Any]


def verdict(row: Row) -> str:
    """What a tool makes of a model, in a word or two."""
    if not row["loads"]:
        return "**no**"
    if "mean_kl" in row:
        return "same" if row["mean_kl"] < SAME else f"KL {row['mean_kl']:.1g}"
    apart = row.get("largest_log_probability_difference", 0)
    if row["same_answers"] == row["answers"] and apart < SAME_LOGS:
        return "same"
    return f"{row['same_answers']} of {row['answers']} answers"


def matrix(record: dict[str, Any]) -> str:
    """One line a tool and format, one column a model."""
    models = list(record["models"])
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in record["rows"]:
        cells.setdefault((row["loader"], row["format"]), {})[row["model"]] = verdict(row)
    lines = [f"| tool | format | {' | '.join(models)} |", f"|---|---|{'---|' * len(models)}"]
    lines += [
        f"| {loader} | {kind} | {' | '.join(found.get(name, '') for name in models)} |"
        for (loader, kind), found in cells.items()
    ]
    return "\n".join(lines)


def details(record: dict[str, Any]) -> str:
    """One line a tool, format and model."""
    lines = [
        "| tool | format | model | result | perplexity (transformers) | mean KL | largest "
        "difference of log-probabilities | same first choice | same answers | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        cells = [
            f"{row['perplexity']:.3f} ({row['expected_perplexity']:.3f})"
            if "perplexity" in row
            else "",
            f"{row['mean_kl']:.1e}" if "mean_kl" in row else "",
            f"{apart:.1e}" if (apart := row.get("largest_log_probability_difference")) else "",
            f"{100 * row['same_first_choice']:.1f} %" if "same_first_choice" in row else "",
            f"{row['same_answers']} of {row['answers']}" if "answers" in row else "",
        ]
        names = [row["loader"], row["format"], row["model"], verdict(row)]
        lines.append(f"| {' | '.join([*names, *cells, row['note'].replace('|', '/')])} |")
    return "\n".join(lines)


def speeds(record: dict[str, Any]) -> str:
    """Tokens a second where they were measured, and how many times the dense Llama's."""
    timed = [row for row in record["rows"] if "tokens_a_second" in row]
    if not timed:
        return ""
    lines = ["", "## Speed", "", "| tool | model | new tokens a second | of the dense Llama's |"]
    lines.append("|---|---|---|---|")
    for row in timed:
        dense = next((r for r in timed if (r["loader"], r["model"]) ==
                      (row["loader"], "llama, dense")), None)  # fmt: skip
        is_llama = dense is not None and row["model"].startswith("llama")
        times = f"{row['tokens_a_second'] / dense['tokens_a_second']:.2f}" if is_llama else ""
        lines.append(
            f"| {row['loader']} | {row['model']} | {row['tokens_a_second']:.0f} | {times} |"
        )
    return "\n".join([*lines, ""])


def table(record: dict[str, Any]) -> str:
    """The result as Markdown."""
    tools = "; ".join(
        f"{loader}: {', '.join(f'{k} {v}' for k, v in found.items())}"
        for loader, found in record["versions"].items()
    )
    models = "\n".join(
        f"- {name}: {'`' + entry['command'] + '`, ' if entry['command'] else ''}"
        f"{entry['architecture']}, {entry['parameters']:,} parameters, "
        f"hidden_size {entry['hidden_size']}, {entry['num_hidden_layers']} layers, "
        f"{entry['num_attention_heads']} heads of {entry['head_dim']}, FFN "
        f"{entry['intermediate_size']}, {entry['vocab_size']} tokens"
        for name, entry in record["models"].items()
    )
    return f"""# Real loaders

    {record["command"]}

{record["tokens"]}, {record["machine"]}. Perplexity, mean KL divergence
(nats a token) and the share of tokens with the same first choice are against the same folder in
transformers, float32. \"Same\": a mean KL below {SAME:g}. Where a tool gives no logits it is
{record["answers"]} that are transformers' own, and, of a server, no
log-probability of these or of the windows {SAME_LOGS:g} away. Blank: not run.

{matrix(record)}
{speeds(record)}
## In detail

{details(record)}

## Models and tools

{CARRIED if record.get("carried", True) else "Models:"}

{models}

Tools: {tools}.
"""
