"""The plan: how a device does the work, decided field by field from what is wanted, the sizes and the device's facts.

`plan` is pure: it reads nothing but its arguments. What it decides is kept with a run and used again when that is
resumed, since free memory would be another then.
"""

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fedmoe.engine.choices import Choices, Precision
from fedmoe.engine.facts import Facts, Sizes, Wanted
from fedmoe.engine.fit import place


@dataclass(kw_only=True, frozen=True, slots=True)
class Predicted:
    """Bytes by what they are for. On a CPU all are in host memory, and the samples are there already."""

    states_device: int
    """States of clients that stay in device memory; the next two lie elsewhere between rounds."""
    states_host: int
    states_files: int
    regions: int
    """States of the clients that train at the moment, or come in next."""
    gradients: int
    low_precision: int
    """The weights' copy in the type that computes."""
    activations: int
    """The reserve that `fit.work` explains."""
    samples: int
    """The data set, which lies where the plan's `data` says."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Plan:
    """Every choice, what each is for, and what it takes."""

    device: Literal["cpu", "cuda"]
    precision: Precision
    head: Literal["plain", "fused"]
    """`fused`: by kernels wherever these take a header's tensors, by PyTorch's operators elsewhere."""
    optimizer: Literal["flat", "torch", "apex"]
    streams: bool
    """Whether the branches of a model have a stream each."""
    graphs: bool
    data: Literal["device", "host"]
    lanes: int
    """Clients or cohorts that train side by side."""
    cohort: int
    """Clients of one architecture that train as one batched model, at most; large ones (`fit.LARGE`) train alone."""
    regions: int
    """Regions a lane."""
    device_bytes: int
    """Budget for clients' states in device memory."""
    host_bytes: int
    """Budget for clients' states in host memory."""
    micro_batch: int
    """Samples in a backward pass at most, those of a step adding up; 0: the whole batch."""
    activation_checkpointing: bool
    """Whether what is within a language model's layers is computed twice rather than kept."""
    predicted: Predicted
    reasons: dict[str, str] = field(hash=False)
    """A sentence for each choice."""

    def device_total(self) -> int:
        """Predicted bytes of device memory."""
        samples = self.predicted.samples if self.data == "device" else 0
        return self.predicted.states_device + self._running() + samples if self.device == "cuda" else 0

    def host_total(self) -> int:
        """Predicted bytes of host memory, above what the data set took when it was read."""
        samples = self.predicted.samples if self.data == "host" else 0
        return self.predicted.states_host + (samples if self.device == "cuda" else self._running())

    def _running(self) -> int:
        p = self.predicted
        return p.regions + p.gradients + p.low_precision + p.activations

    def to_json(self) -> str:
        """The plan as JSON, which `from_json` reads."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote. Raises ValueError, in one line, for anything else."""
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the plan is not JSON: {error}") from error
        made: Plan = _read(cls, content, "the plan")
        return made


CHOICES = tuple(f.name for f in fields(Plan) if f.name not in ("device", "predicted", "reasons"))
"""The fields that are decided, each with a reason."""


def plan(wanted: Wanted, sizes: Sizes, facts: Facts) -> tuple[Plan, list[str]]:
    """The plan, and a warning for each wanted value that cannot be had here, with what is taken in its place.

    Raises ValueError where a fused head or apex is wanted and cannot be had, or where no client fits in memory.
    """
    choices = Choices(wanted, sizes, facts)
    precision, head = choices.precision(), choices.head()
    optimizer = choices.optimizer(precision)
    streams = choices.streams()
    data, work, device_bytes, host_bytes = choices.memory(precision)
    graphs = choices.graphs(data)
    states_device, states_host, states_files = place(sizes, device_bytes, host_bytes)
    predicted = Predicted(
        states_device=states_device,
        states_host=states_host,
        states_files=states_files,
        regions=work.states,
        gradients=work.gradients,
        low_precision=work.low_precision,
        activations=work.activations,
        samples=sizes.samples,
    )
    decided = Plan(
        device=facts.device,
        precision=precision,
        head=head,
        optimizer=optimizer,
        streams=streams,
        graphs=graphs,
        data=data,
        lanes=work.lanes,
        cohort=work.cohort,
        regions=work.regions,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        micro_batch=choices.sizes.micro_batch if choices.sizes.backward < choices.sizes.batch else 0,
        activation_checkpointing=choices.sizes.checkpointing == "on",
        predicted=predicted,
        reasons=choices.reasons,
    )
    assert decided.reasons.keys() == set(CHOICES)
    return decided, choices.warnings


def _read(kind: Any, value: Any, name: str) -> Any:
    """`value` as `kind`, checked through and through."""
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r}, must be an object")
        types = get_type_hints(kind)
        for key in sorted(value.keys() ^ types.keys()):
            raise ValueError(f"{name} {'lacks' if key in types else 'has the unknown key'} {key!r}")
        read = {key: _read(types[key], item, f"{name}'s {key!r}") for key, item in value.items()}
        return kind(**read)  # type: ignore[operator]
    if get_origin(kind) is Literal:
        fits, wanted = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
    elif get_origin(kind) is dict:
        fits = isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
        wanted = "an object of strings"
    elif kind is int:
        fits, wanted = type(value) is int and value >= 0, "a whole number from 0"
    else:
        fits, wanted = type(value) is bool, "true or false"
    if not fits:
        raise ValueError(f"{name} is {value!r}, must be {wanted}")
    return value
