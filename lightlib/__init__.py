"""lightlib: learn and try how large language models are made lighter."""

__version__ = "0.1.0"
__all__ = ["load", "save"]


def __getattr__(name: str):
    # save and load need torch; a bare `import lightlib` must not
    if name in __all__:
        from lightlib import persist

        return getattr(persist, name)
    raise AttributeError(f"module 'lightlib' has no attribute {name!r}")
