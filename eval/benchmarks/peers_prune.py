"""One peer, by itself: reads a model and token windows, writes a folder of plain transformers.

    python eval/benchmarks/peers_prune.py METHOD MODEL WINDOWS KEEP OUT

peers.py runs this in a process of its own, with the peer's package on its path. It knows torch and
transformers, not sp3llm, so that another interpreter can run it. WINDOWS is a file of torch with
`calibration` and `probe`, token ids; beside the folder, OUT.json says seconds and memory, and
OUT.probe.pt the token losses of the probe by the model that was pruned, before it was saved.

Peers prune in float32 and save in the model's own dtype; none is tuned or refitted afterwards.
"""

import argparse
import json
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from own_peak import peak_memory
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROWS = 2
"""Windows in a forward."""


def token_losses(model: Any, tokens: Tensor) -> Tensor:
    """Nats of every token but the first, `(windows, tokens - 1)`, float64."""
    with torch.no_grad():
        # In float64: a float32 sum over all tokens of a vocabulary is off by 3e-4.
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].double()
    return cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def true_count(config: Any) -> int:
    """Parameters of a model of that config, tied tensors once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


def changed(config: Any, **sizes: int) -> Any:
    """A copy of a config with other sizes; what has an entry a layer is cut to the layers."""
    values = {**config.to_dict(), **sizes}
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    return type(config).from_dict(values)


def most(sizes: range, config_of: Callable[[int], Any], budget: float) -> int:
    """The first of the sizes, or of the ratios, with which a model fits the budget; parameters fall
    along them.
    """
    first = bisect_left(sizes, -budget, key=lambda size: -true_count(config_of(size)))
    if first == len(sizes):
        raise SystemExit(f"Nothing that this method cuts leaves {budget:,.0f} parameters.")
    return sizes[first]


# --------------------------------------------------------------------------- plain transformers


def block_influence(model: Any, tokens: Tensor) -> Tensor:
    """Of every layer, 1 - cosine of its input and its output, mean over tokens (ShortGPT)."""
    layers = model.model.layers
    sums = torch.zeros(len(layers), dtype=torch.float64)

    def watch(index: int) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosines = cosine_similarity(inputs[0].float(), after.float(), dim=-1)
            sums[index] += (1 - cosines).double().sum()

        return hook

    handles = [layer.register_forward_hook(watch(i)) for i, layer in enumerate(layers)]
    with torch.no_grad():
        for rows in tokens.split(ROWS):
            model.model(input_ids=rows, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums / tokens.numel()


def without_layers(model: Any, tokens: Tensor, budget: float, above: int) -> Any:
    """Drop the layers of least influence, all at once; `above` layers more than the budget allows
    stay.
    """
    config, influence = model.config, block_influence(model, tokens)
    whole = config.num_hidden_layers
    kept = above + most(
        range(whole - 1, 0, -1), lambda n: changed(config, num_hidden_layers=n), budget
    )
    stay = sorted(influence.topk(kept).indices.tolist())
    print("dropped", sorted(set(range(whole)) - set(stay)))
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in stay])
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config = changed(config, num_hidden_layers=kept)
    return model


def without_neurons(model: Any, tokens: Tensor, budget: float) -> Any:
    """Drop the FFN neurons whose weights are smallest, as many in every layer."""
    config = model.config
    size = most(
        range(config.intermediate_size // 8 * 8 - 8, 0, -8),
        lambda n: changed(config, intermediate_size=n),
        budget,
    )
    for layer in model.model.layers:
        mlp = layer.mlp
        rows = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T], 1)
        stay = rows.detach().norm(dim=1).topk(size).indices.sort().values
        for linear, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            linear.weight = torch.nn.Parameter(linear.weight.detach().index_select(dim, stay))
    model.config = changed(config, intermediate_size=size)
    return model


# --------------------------------------------------------------------------- torch-pruning


def pruned(model: Any, importance: Any, ratio: float, cut: str) -> Any:
    """By torch-pruning, as its example for language models sets it up; `cut` is what goes: `all`,
    by one ratio; `heads-stay`, width and FFN by one ratio; `ffn` alone.
    """
    import torch_pruning as tp

    config, num_heads, untouched = model.config, {}, [model.lm_head]
    for layer in model.model.layers:
        attention = layer.self_attn
        num_heads[attention.q_proj] = config.num_attention_heads
        num_heads[attention.k_proj] = config.num_key_value_heads
        num_heads[attention.v_proj] = config.num_key_value_heads
        if cut == "ffn":
            untouched += [attention.q_proj, attention.k_proj, attention.v_proj]
            untouched += [attention.o_proj, layer.mlp.down_proj]
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=torch.arange(16)[None],
        importance=importance,
        global_pruning=False,
        pruning_ratio=ratio,
        ignored_layers=untouched,
        num_heads=num_heads,
        prune_num_heads=cut == "all",
        prune_head_dims=False,  # rotary embeddings need them as they are
        head_pruning_ratio=ratio if cut == "all" else 0.0,
        round_to=4,
        output_transform=lambda output: output.logits,  # it does not know transformers' caches
    )
    pruner.step()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    heads = attention.q_proj.out_features // attention.head_dim
    groups = attention.k_proj.out_features // attention.head_dim
    model.config = changed(
        config,
        hidden_size=model.lm_head.in_features,
        intermediate_size=mlp.gate_proj.out_features,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=attention.head_dim,
    )
    for layer in model.model.layers:
        layer.self_attn.num_key_value_groups = heads // groups
    return model


def sizes_at(config: Any, ratio: float, cut: str) -> dict[str, int]:
    """What `pruned` leaves at a ratio, to search by without pruning: widths rounded down to fours,
    of the heads of every KV group as many.
    """

    def left(size: int) -> int:
        return int(size * (1 - ratio)) // 4 * 4

    sizes = {"intermediate_size": left(config.intermediate_size)}
    if cut != "ffn":
        sizes["hidden_size"] = left(config.hidden_size)
    if cut == "all":
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        removed = heads - int(heads * (1 - ratio))
        sizes["num_attention_heads"] = heads - -(-removed // groups) * groups
    return {**sizes, "head_dim": config.head_dim}


def by_torch_pruning(model: Any, tokens: Tensor, budget: float, score: str, cut: str) -> Any:
    """Prune by the smallest ratio that comes to the budget, in steps of a thousandth."""
    import torch_pruning as tp

    config = model.config
    tied = config.tie_word_embeddings
    thousandth = most(
        range(1, 600), lambda n: changed(config, **sizes_at(config, n / 1000, cut)), budget
    )
    ratio = thousandth / 1000
    print("ratio", ratio, sizes_at(config, ratio, cut), flush=True)
    if score == "taylor":
        for rows in tokens.split(ROWS):
            model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        importance = tp.importance.GroupTaylorImportance()
    else:
        importance = tp.importance.GroupMagnitudeImportance(p=2)
    model = pruned(model, importance, ratio, cut)
    if true_count(model.config) > budget:
        raise SystemExit(f"The ratio {ratio} leaves more than the budget.")
    if tied:  # each side of a tie is cut by itself, and alike
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not torch.equal(table.weight, head.weight):
            raise SystemExit("The tied table and head were not cut alike.")
        head.weight = table.weight
    return model


# --------------------------------------------------------------------------- others


def by_modelopt(model: Any, tokens: Tensor, budget: float, mode: str) -> Any:
    """By nvidia-modelopt: it takes the model, or says why it does not."""
    import modelopt.torch.prune as mtp

    kept = budget / sum(p.numel() for p in model.parameters())
    loader = [
        {"input_ids": rows, "labels": rows, "use_cache": False} for rows in tokens.split(ROWS)
    ]
    config = {"data_loader": loader, "collect_func": lambda batch: batch}
    config["score_func"] = lambda m: -m(**loader[0]).loss.item()
    config["checkpoint"] = None
    small, _ = mtp.prune(
        model, mode=mode, constraints={"params": f"{100 * kept:g}%"},
        dummy_input=tokens[:1], config=config,
    )  # fmt: skip
    return small


METHODS: dict[str, Callable[[Any, Tensor, float], Any]] = {
    "magnitude-ffn": without_neurons,
    "block-influence": partial(without_layers, above=0),
    "block-influence-one-more": partial(without_layers, above=1),
    **{
        f"torch-pruning-{score}-{cut}": partial(by_torch_pruning, score=score, cut=cut)
        for score in ("magnitude", "taylor")
        for cut in ("all", "heads-stay", "ffn")
    },
    "modelopt-fastnas": partial(by_modelopt, mode="fastnas"),
    "modelopt-mcore_minitron": partial(by_modelopt, mode="mcore_minitron"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("keep", type=float)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    windows = torch.load(options.windows)
    dtype = AutoConfig.from_pretrained(options.model).dtype or torch.float32
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    budget = options.keep * sum(p.numel() for p in model.parameters())
    model = METHODS[options.method](model, windows["calibration"], budget)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():  # the parameters alone: rotary frequencies are float32 wherever they run
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    probe = token_losses(model.eval(), windows["probe"])
    model.to(dtype).save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    seconds = time.perf_counter() - started
    peak = peak_memory()
    torch.save(probe, f"{options.out}.probe.pt")
    said = {"seconds": seconds, "peak_memory_bytes": peak}
    Path(f"{options.out}.json").write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
