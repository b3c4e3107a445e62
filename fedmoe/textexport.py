"""A trained client of text as a folder that transformers and peft open, with the rest of its mixture beside it."""

import dataclasses
from pathlib import Path

from fedmoe import checkpoint, files, serving, textserving
from fedmoe.errors import UserError, reason
from fedmoe.models import hf
from fedmoe.models.language import Body
from fedmoe.textserving import ADAPTER, BASE, CARD, GLOBAL, MIXTURE, Served


def write(served: Served, folder: Path, final: Path) -> None:
    """Fill `folder`, which will be called `final`: local expert and header as a model of transformers.

    Of one tuned by low-rank adapters these, as peft has them, and what they belong to in `base`, unless that is on the
    hub. Raises UserError for whatever transformers or peft cannot write.
    """
    card, model = served.card, served.model
    body = model.local_expert
    assert isinstance(body, Body)
    try:
        with serving.quiet():
            _ends(body, served.tokenizer.end)
            if card.config.model.tune == "lora":
                _adapters(served, body, folder, final)
            else:
                body.whole.save_pretrained(folder)
            served.tokenizer.save(folder)
            if card.config.method != "local":
                checkpoint.write_state(folder, MIXTURE, serving.copied(textserving.beside(model)))
                if card.config.model.global_expert.startswith(hf.PREFIX):
                    shared = model.get_submodule("global_expert")
                    assert isinstance(shared, Body)
                    shared.whole.config.save_pretrained(folder / GLOBAL)
    except (OSError, UserError):
        raise
    except Exception as error:  # whatever transformers, peft and safetensors raise, as for a full disk
        raise UserError(f"the model of client {card.client} cannot be exported: {reason(error)}") from error
    made = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    card = dataclasses.replace(card, files=tuple(checkpoint.entry_of(folder, name) for name in made))
    files.write(folder / CARD, card.to_json().encode())


def _ends(body: Body, end: int) -> None:
    """Have transformers generate as `textserving.generate` does: up to the tokenizer's end token."""
    told = body.whole.generation_config
    if told is not None:
        told.eos_token_id = told.pad_token_id = end
        told.bos_token_id = end if told.bos_token_id is None else told.bos_token_id


def _adapters(served: Served, body: Body, folder: Path, final: Path) -> None:
    config, whole = served.card.config.model, body.whole
    base = final / BASE
    name = config.local[0].removeprefix(hf.PREFIX)
    from_hub = name != config.local[0] and config.weights == "pretrained" and not Path(name).expanduser().is_dir()
    if not from_hub:
        # As it was before there were adapters in its layers.
        tensors = {n.replace(".base_layer.", "."): t for n, t in whole.state_dict().items() if ".lora_" not in n}
        whole.save_pretrained(folder / BASE, state_dict=tensors)
    told = whole.peft_config["default"]
    told.base_model_name_or_path = name if from_hub else str(base)
    told.save_pretrained(folder)
    checkpoint.write_state(folder, ADAPTER, serving.copied(textserving.adapter(whole)))
