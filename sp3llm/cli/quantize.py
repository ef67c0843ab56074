"""`sp3llm quantize`."""

from sp3llm.errors import UserError
from sp3llm.options import QuantizeConfig

SETTINGS = QuantizeConfig
SUMMARY = "write a compressed model in int8 or nf4, beside the dense one in as many bits"
DESCRIPTION = """\
Write a compressed model in few bits with bitsandbytes, beside the one in full
precision, and measure the perplexity of both and of the dense model, in full
precision and quantized alike."""
EPILOG = None


def run(settings: QuantizeConfig) -> None:
    """Quantizes the model and shows the four perplexities."""
    from rich.console import Console

    console = Console()
    with console.status("importing torch and transformers"):
        import torch
        import transformers

        from sp3llm.quantization.story import quantize

    transformers.utils.logging.set_verbosity_error()
    try:
        quantize(settings, console)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The GPU ran out of memory, which holds the quantized dense model whole: close what "
            "else uses it, or use --device cpu."
        ) from error
