"""Models of Hugging Face transformers by name, `hf/NAME`: a folder or a repository of the hub; the library is optional.

Only a config.json and safetensors are ever read: no pickled weights, no code of a repository.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedmoe import config as settings
from fedmoe.engine.seeds import globals_kept
from fedmoe.errors import UserError, reason
from fedmoe.models import attention, tuning

PREFIX = "hf/"
OLDEST = (5, 4)
"""The version of transformers from which its models can be made without memory."""
CAUSAL = "AutoModelForCausalLM"
FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
"""What is fetched of a repository; only the first where no weights are wanted."""


class Source(NamedTuple):
    """Where a model comes from: its transformers configuration, and the folder of its weights; None: fresh ones."""

    name: str
    config: Any
    folder: Path | None


class ImageExtractor(tuning.Extractor):
    """An image classifier whose last layer is taken off."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, D]."""
        return self.given(self.body(pixel_values=self.taken(x), return_dict=True).logits)


def make(
    name: str, shape: tuple[int, int, int], classes: int, options: settings.Model
) -> tuple[ImageExtractor, nn.Linear]:
    """An image classifier without its last linear layer, and that layer, new unless it is for as many classes.

    Fresh weights are made for images of this shape; raises UserError where pretrained ones are for another, or the
    classifier ends otherwise. Images come as the data set normalizes them.
    """
    source = find(name, options)
    _fit(source, shape)
    source.config.num_labels = classes
    whole, fresh = load("AutoModelForImageClassification", source, options)
    linear = {path: module for path, module in whole.named_modules() if isinstance(module, nn.Linear)}
    path = next((path for path in reversed(linear) if linear[path].out_features == classes), None)
    if path is None or any(not key.startswith(f"{path}.") for key in fresh):
        why = f"its weights do not fit, such as {min(fresh)!r}" if fresh else "it has no linear layer for them"
        raise UserError(f"model {name!r} cannot be made for {classes} classes: {why}")
    x = torch.linspace(-1, 1, 2 * math.prod(shape)).view(2, *shape).to(whole.dtype)
    own = evaluated(whole, lambda: whole(pixel_values=x).logits)
    whole.set_submodule(path, nn.Identity())
    try:
        last = same(linear[path](evaluated(whole, lambda: whole(pixel_values=x).logits)), own)
    except RuntimeError:  # as where two classifiers' logits are added
        last = False
    if not last:
        raise UserError(f"model {name!r} does more than its layer {path!r} to make logits: this is not supported")
    tuning.apply(name, whole, whole, linear[path], options, probe=True)  # new mostly, and small
    return ImageExtractor(whole, linear[path]), linear[path]


def library(name: str) -> Any:
    """transformers, silent; UserError where it is missing, too old, or cannot be imported."""
    transformers = tuning.optional("transformers", name)
    from packaging.version import Version  # which transformers needs, too

    if Version(transformers.__version__).release < OLDEST:
        raise UserError(
            f"model {name!r} needs transformers {OLDEST[0]}.{OLDEST[1]} or newer, {transformers.__version__} is "
            "installed: pip install --upgrade transformers"
        )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def find(name: str, options: settings.Model) -> Source:
    """What `hf/NAME` is: a folder, or a repository of the hub, which is fetched, with its weights if they are wanted.

    They are not where `model.weights` is "random", and in a plan. Raises UserError if there is no such model.
    """
    transformers, wanted = library(name), name.removeprefix(PREFIX)
    folder, weights = Path(wanted).expanduser(), options.weights == "pretrained" and not on_meta()
    if not wanted or folder.is_file():
        raise UserError(f"model {name!r} is neither a folder nor a name on the hub: write {PREFIX}NAME")
    if not folder.is_dir():
        folder = _fetched(name, wanted, weights)
    if not (folder / "config.json").is_file():
        adapters = (folder / "adapter_config.json").is_file()
        fix = ": it holds adapters alone; name the folder of the model that they belong to" if adapters else ""
        raise UserError(f"model {name!r}: folder {folder} has no config.json{fix}")
    if weights and not any(folder.glob("model*.safetensors")):
        raise UserError(
            f"model {name!r}: folder {folder} has no weights in model.safetensors, and no other format is read: save "
            'them as that, or set model.weights to "random"'
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a broken file makes it raise
        raise UserError(f"model {name!r}: {folder / 'config.json'} cannot be used: {reason(error)}") from error
    config.name_or_path = wanted if weights else ""
    return Source(name, config, folder if weights else None)


def load(auto: str, source: Source, options: settings.Model) -> tuple[Any, set[str]]:
    """The whole model by transformers' class `auto`, its attention as in the options, in training mode.

    Also the names of parameters that are fresh, because the weights have them for other sizes: of an image classifier
    only. Raises UserError for weights that cannot be read or are not this model's.
    """
    name, config, folder = source
    transformers, origin = library(name), config.name_or_path
    if options.attention == "flash_attention_2" and not transformers.utils.is_flash_attn_2_available():
        raise UserError(
            'model.attention is "flash_attention_2", which needs a GPU and the package flash-attn: install it, or set '
            '"sdpa"'
        )
    # With "frozen" the header trains, and must not be rounded.
    dtype = tuning.body_dtype(options) if options.tune == "lora" else torch.float32
    chosen: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if options.attention != "sdpa":
        chosen["attn_implementation"] = options.attention
    elif auto == CAUSAL:
        transformers.AttentionInterface.register(attention.NAME, attention.causal_attention)
        chosen["attn_implementation"] = attention.NAME
    if folder is not None:
        chosen |= {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        chosen["ignore_mismatched_sizes"] = auto != CAUSAL
    made, fresh = getattr(transformers, auto), set()
    try:
        if folder is None:
            model = made.from_config(config, **chosen)
        else:
            model, info = made.from_pretrained(folder, config=config, **chosen)
            fresh = {key for key, *_ in info["mismatched_keys"]}
            if lost := sorted(set(info["missing_keys"]) - fresh):
                raise UserError(
                    f"model {name!r}: the weights in {folder} lack {len(lost)} of its parameters, such as {lost[0]!r}"
                )
        if options.activation_checkpointing == "on":
            checkpoint(model, True)
    except UserError:
        raise
    except Exception as error:  # of many kinds, one for each thing that can be wrong with a file or a configuration
        what = "a causal language model" if auto == CAUSAL else "an image classifier"
        why = f"it is not {what}" if "Unrecognized configuration class" in str(error) else reason(error)
        raise UserError(f"model {name!r} cannot be made: {why}") from error
    model.config.name_or_path = origin
    return model.train(), fresh


def checkpoint(model: Any, on: bool) -> None:
    """Whether what is within the model's layers is computed again in the backward pass rather than kept."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # as later versions say
    if on:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    elif getattr(model, f"is_{kind}_checkpointing"):
        getattr(model, f"{kind}_checkpointing_disable")()


def on_meta() -> bool:
    """Whether modules are being made without memory, for their shapes only."""
    return torch.get_default_device().type == "meta"


def evaluated(model: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """What `run` gives while `model` is in evaluation mode; leaves no trace."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), globals_kept():
        out = run()
    model.train(was_training)
    return out


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results of the same arithmetic are equal but for rounding; true of shapes alone."""
    if ours.device.type == "meta":
        return ours.shape == theirs.shape
    allowed = 1e-4 if ours.dtype == torch.float32 else 2e-2
    return bool((ours.float() - theirs.float()).abs().max() <= allowed * theirs.abs().max())


def _fit(source: Source, shape: tuple[int, int, int]) -> None:
    """Make a fresh model for images of this shape; raise UserError where a pretrained one is for another."""
    config = source.config
    if hasattr(config, "num_channels") and config.num_channels != shape[0]:
        if source.folder is not None:
            raise UserError(
                f"model {source.name!r} takes images of {config.num_channels} channels, these have {shape[0]}: set "
                'model.weights to "random", or choose another model'
            )
        config.num_channels = shape[0]
    if not hasattr(config, "image_size"):
        return
    sides = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
    if source.folder is not None and tuple(sides) != shape[1:]:
        raise UserError(
            f"model {source.name!r} takes images of {sides[0]}x{sides[1]} pixels, these have {shape[1]}x{shape[2]}: "
            'set data.image_size, or model.weights to "random"'
        )
    config.image_size = shape[1] if shape[1] == shape[2] else list(shape[1:])


def _fetched(name: str, wanted: str, weights: bool) -> Path:
    """The folder into which the hub's repository `wanted` has been fetched, now or before."""
    import huggingface_hub
    from huggingface_hub import errors

    advice = f"{PREFIX}NAME must be a folder or a repository of the hub"
    try:
        return Path(huggingface_hub.snapshot_download(wanted, allow_patterns=list(FILES if weights else FILES[:1])))
    except errors.GatedRepoError as error:
        raise UserError(
            f"model {name!r} is gated: ask for access on its page, and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"model {name!r} is not there, or needs a login: {advice}") from error
    except errors.HFValidationError as error:
        raise UserError(f"model {name!r}: there is no such folder, and no such name can be on the hub") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"model {name!r} is neither a folder nor fetched already, and the hub cannot be reached: {advice}"
        ) from error
    except Exception as error:  # of the network, or of the disk
        raise UserError(f"model {name!r} cannot be fetched: {reason(error)}") from error
