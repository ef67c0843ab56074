"""An old address: what was here is in `sp3llm.text`. For scripts written before that."""

from sp3llm.text.tokenizer import load_tokenizer
from sp3llm.text.windows import calibration_windows

__all__ = ["calibration_windows", "load_tokenizer"]
