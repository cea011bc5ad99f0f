"""Whether Triton can run here. It is imported only where it is needed: the project works without it."""

from __future__ import annotations

from functools import lru_cache
from subprocess import SubprocessError


@lru_cache(maxsize=1)
def missing() -> str:
    """Why no Triton kernel can run here, or ""."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # builds what launches kernels, with a C compiler
    except (ImportError, OSError, RuntimeError, SubprocessError) as error:
        return f"Triton cannot run: {error}"
    return ""
