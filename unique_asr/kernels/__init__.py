"""The Triton kernels of the top-level folder `kernels/`, as `unique_asr.kernels.<name>`.

That folder has no `__init__.py` and is never imported by its own name: with one, it would hide Hugging Face's package
`kernels` from transformers wherever the repository root is on the path. Installed, the wheel holds its files here.
"""

from pathlib import Path

_CHECKOUT = Path(__file__).parents[2]

if (_CHECKOUT / "pyproject.toml").is_file():  # elsewhere a folder `kernels` may be Hugging Face's
    __path__.append(str(_CHECKOUT / "kernels"))
