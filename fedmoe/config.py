"""The configuration: what can be set, its documentation and its defaults. Imports neither torch nor the method."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fedmoe.errors import UserError


@dataclass(kw_only=True, slots=True, frozen=True)
class Run:
    """Where and on what the run takes place."""

    dir: str = ""
    """Run folder; empty chooses `runs/<date>-<time>`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; `auto` takes a CUDA GPU where there is one."""
    threads: int = 0
    """CPU threads for arithmetic; 0 takes PyTorch's choice. The number used is saved and restored on resume."""
    deterministic: bool = False
    """Use deterministic algorithms only: bit-identical from run to run on a GPU too."""
    report: bool = True
    """Write `report.html` into the run folder at the end."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Federation:
    """Who takes part, and for how long."""

    clients: int = 10
    """Number of clients, N."""
    fraction: float = 1.0
    """Share of the clients sampled in a round: K = max(1, round(fraction * N))."""
    rounds: int = 20
    """Communication rounds to train."""
    epochs: int = 1
    """Local epochs per round, E."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Server:
    """How one global expert is made of those that a round's clients return. docs/aggregation.md has the formulas."""

    aggregation: Literal["mean", "uniform", "median", "trimmed_mean", "clipped_mean", "krum", "multi_krum"] = "mean"
    """`mean`: weighted by the training samples of each client; `uniform`: with equal weights. Robust against bad
    clients: `median` and `trimmed_mean` of each coordinate; `clipped_mean`: the mean of updates of limited norm;
    `krum`: the one that has the nearest neighbours; `multi_krum`: the uniform mean of several such."""
    trim: float = 0.1
    """Share of the round's clients left out on either side of each coordinate (trimmed_mean)."""
    clip_norm: float = 0.0
    """Largest norm of an update; 0 takes `clip_factor` times the median norm of the round (clipped_mean)."""
    clip_factor: float = 1.0
    """Largest norm of an update, as a multiple of the median norm of the round (clipped_mean)."""
    byzantine: int = 1
    """Number f of a round's clients that may be bad; a round needs 2 f + 3 clients (krum, multi_krum)."""
    chosen: int = 0
    """Number of updates that are averaged; 0 takes all but `byzantine` (multi_krum)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Attack:
    """Clients that send what they should not: a simulation, to try `server.aggregation` on."""

    kind: Literal["none", "scale", "flip", "nan"] = "none"
    """What bad clients send for the theta_k that they trained, theta being what they were sent. `scale`:
    theta + factor * (theta_k - theta); `flip`: theta - factor * (theta_k - theta); `nan`: NaN, which is rejected."""
    clients: tuple[int, ...] = ()
    """Which clients are bad, in every round that they take part in."""
    factor: float = 10.0
    """By what an update is multiplied (scale, flip)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Data:
    """The data set. All its splits are pooled and then dealt to the clients."""

    kind: Literal["images", "text"] = "images"
    """What the samples are: images with labels, or sequences of tokens of text with whose text it is."""
    name: str = "digits"
    """`digits` (embedded); a file or folder of parquet, arrow, npz or IDX files; a folder of images for each class; or
    the name of a Hugging Face data set. Text: `stdlib` (the standard library of the Python that runs, each top-level
    package or module a source); a file or folder of JSONL, parquet or arrow files; a folder of text files, whose
    subfolders are the sources, or where it has none its files; or the name of a Hugging Face data set."""
    splits: tuple[str, ...] = ()
    """Splits to use, by name; empty uses all."""
    image: str = ""
    """Image column or array; empty finds it by its name or as the only one."""
    label: str = ""
    """Label column or array; empty finds it by its name, such as `label`, or as the only class-label column. Text: the
    column or field that says whose it is, its source; empty takes `source`, or where there is none the file."""
    text: str = ""
    """Text column or field; empty finds `text` or `content`, or the only one of text."""
    tokenizer: str = "bytes"
    """What cuts text into tokens: `bytes`; a `tokenizer.json` or a folder with one; or the name of a Hugging Face
    model."""
    sequence_length: int = 128
    """Tokens that are predicted in a sample of text, T."""
    image_size: int = 0
    """Resize images to this many pixels square; 0 keeps their size (digits: 28)."""
    limit: int = 0
    """Use only this many samples, drawn with the seed; 0 uses all."""
    mean: float = 0.5
    """Subtracted from pixels scaled to [0, 1]."""
    std: float = 0.5
    """Divides pixels after the mean is subtracted."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Partition:
    """How samples are dealt to clients."""

    kind: str = "pathological"
    """`pathological`: a few classes per client; `dirichlet`: class shares drawn from Dirichlet(alpha); `iid`;
    `natural`: a client for each value of a column; or a partitioner of flwr-datasets by its name, such as
    `ShardPartitioner`, made with `--partition.options.NAME VALUE`."""
    classes_per_client: int = 2
    """Classes each client sees (pathological)."""
    alpha: float = 0.5
    """Concentration of the Dirichlet distribution; smaller is more skewed (dirichlet)."""
    column: str = ""
    """Column of the data whose values are clients, those with most samples first (natural), or that a partitioner
    partitions by instead of the label; `split`: which split, or folder above the classes, a sample comes from."""
    options: dict[str, Any] = field(default_factory=dict)
    """What a partitioner of flwr-datasets is made with, by name."""
    test_fraction: float = 0.2
    """Share of every client's samples held out for its own test."""
    min_samples: int = 10
    """A partition that leaves any client fewer samples than this is refused."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Model:
    """The clients' models: a built-in name, `timm/NAME`, `hf/NAME`, or `package.module:factory`; of text the built-in
    ones for it, or `hf/NAME`.

    Built in are the paper's `cnn-1` to `cnn-5`, of its MNIST-size family for images up to 28 pixels and of its CIFAR
    family above; `resnet-18`, `-34` and `-50`; `vit-tiny`, `-small` and `-base`. For text `llama-nano`, `-tiny` and
    `-small`, and so on with `qwen`, `gpt2` and `gemma`. `hf/NAME` is an image classifier of Hugging Face's
    transformers, or of text any causal language model, NAME being a folder or a name on its hub.
    """

    local: tuple[str, ...] = ("cnn-1", "cnn-2", "cnn-3", "cnn-4", "cnn-5")
    """Local models; client i uses entry i mod the number of entries."""
    global_expert: str = "cnn-5"
    """Model whose extractor is the global expert that all clients share."""
    adapter: Literal["none", "linear"] = "none"
    """What a client whose local expert is of another width than the global expert puts behind the latter: a private
    linear layer to its own width, or nothing, which is an error then."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """Weights that `hf/NAME` begins with: those that come with it, or such as its family begins training with."""
    tune: Literal["full", "lora", "frozen"] = "full"
    """What of a local expert of transformers trains: all; low-rank adapters of its body's linear layers, and an image
    classifier's header (`lora`, by peft); or no more than its header, and not that where it is the embeddings
    (`frozen`). The global expert always trains."""
    lora_rank: int = 16
    """Rank of the adapters (lora)."""
    lora_alpha: float = 32.0
    """What they add is multiplied by this over their rank (lora)."""
    lora_targets: tuple[str, ...] = ()
    """Names of the layers that get one; empty: all linear ones of the body (lora)."""
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"
    """What weights that do not train are kept in; half the memory as `bf16`."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """How language models compute attention: by PyTorch's fused kernels, by its plain operators, or by the library
    flash-attn."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute what is within a language model's layers twice, rather than keep it for the backward pass. `auto`: where
    a step does not fit in memory otherwise."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Gate:
    """The gating network: flatten, norm, Linear, norm, sigmoid, Linear, norm, softmax."""

    norm: str = "none"
    """Three of `switch`, `layer`, `batch`, `none` joined by `-` (input, hidden, output); or `none`, or `paper`
    (switch-batch-batch)."""
    hidden: int = 128
    """Width of the hidden layer."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Training:
    """Local training: one optimizer over all four modules together."""

    batch_size: int = 64
    """Samples per step; a client with fewer uses all it has."""
    micro_batch: int = 0
    """Samples per backward pass; the gradients of a step's passes add up. 0 takes the batch as a whole."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd`: with momentum; `adamw`: Adam with decoupled weight decay."""
    lr: float = 0.01
    """Learning rate."""
    momentum: float = 0.9
    """Momentum (sgd)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """How much of the running means of the gradient and of its square each step keeps (adamw)."""
    eps: float = 1e-8
    """Added to the root of the mean square, which divides (adamw)."""
    optimizer_states: Literal["fp32", "8bit"] = "fp32"
    """How the two running means are kept between steps: 8 bytes a parameter, or 2.03 (adamw)."""
    weight_decay: float = 1e-3
    """L2 penalty added to the gradient (sgd); share of a weight, times the learning rate, that a step takes (adamw)."""
    clip_norm: float = 0.0
    """Scale the gradient of a step down to this norm, over all modules, where it is larger; 0 leaves it."""
    augment: Literal["none", "flip", "crop", "crop-flip"] = "none"
    """Change every training image anew in every epoch: `flip` mirrors half of them from left to right, `crop` shifts
    them by up to 4 pixels and fills with black."""
    theta_momentum: Literal["keep", "reset"] = "reset"
    """What becomes of the global expert's momentum, or running means and count of steps, when a new one arrives."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Evaluation:
    """When and what to evaluate; always on a client's own held-out samples, always the whole mixture."""

    every: int = 1
    """Evaluate after every so many rounds (and after the last)."""
    clients: Literal["all", "sampled"] = "all"
    """Evaluate every client, or those sampled in the round."""
    aggregated: bool = False
    """Also evaluate with the newly aggregated global expert in place of the client's own."""
    batch_size: int = 512
    """Samples per forward pass."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Checkpoint:
    """When to write checkpoints. Files are never modified; the manifest is renamed into place last."""

    every: int = 1
    """Write a checkpoint after every so many rounds (and after the last)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Engine:
    """How the device does the work; whatever is chosen, the numbers agree within the precision of the type.

    `fedmoe plan` shows what these come to on a machine.
    """

    kind: Literal["fast", "reference"] = "fast"
    """`fast`: the engine, as `fedmoe plan` says; `reference`: the plain loop, on which nothing below has an effect."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """What steps compute in; the weights are kept in fp32. `auto`: bf16 on GPUs from compute capability 8.0, else fp32;
    `fp16` scales the loss."""
    head: Literal["plain", "auto", "fused"] = "auto"
    """Mix, header and loss by PyTorch's operators (`plain`), or by fused Triton kernels: where they can run (`auto`),
    or nowhere else (`fused`, an error where they cannot)."""
    optimizer: Literal["auto", "flat", "torch", "apex"] = "auto"
    """Who does the optimizer's step: the kernel over flat memory (`flat`), PyTorch, or NVIDIA apex, an error where that
    is not there. `auto`: flat where the kernels can run, else PyTorch."""
    streams: Literal["auto", "on", "off"] = "auto"
    """Give each expert a CUDA stream, so that they run side by side. `auto`: where there are two."""
    graphs: Literal["auto", "on", "off"] = "auto"
    """Capture a step as a CUDA graph and replay it. `auto`: on every GPU."""
    data: Literal["auto", "device", "host"] = "auto"
    """Where the samples lie. `auto`: on the device if they take at most a quarter of its free memory."""
    lanes: int = 0
    """Clients, or cohorts of them, that train side by side on one GPU; 0 leaves it to the plan."""
    cohort: int = 0
    """Small clients of one architecture that train as one batched model, at most; 1 trains every client alone, 0 leaves
    it to the plan."""
    device_memory_mb: int = 0
    """Budget for the states of clients in device memory, in MB (10^6 bytes); 0 leaves it to the plan."""
    host_memory_mb: int = 0
    """Budget for the states of clients in host memory, in MB; 0 leaves it to the plan. The rest is in files."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Config:
    """A federation to train."""

    seed: int = 0
    """Seed from which data order, partition, sampling, initialization and training each derive their own."""
    method: Literal["fedmoe", "static", "local"] = "fedmoe"
    """`fedmoe`; or a control: `static` (fixed mixing weights, no gate), `local` (no global expert, nothing shared)."""
    static_weight: float = 0.5
    """Weight of the global expert with `method = "static"`; the local expert has the rest."""
    run: Run = field(default_factory=Run)
    federation: Federation = field(default_factory=Federation)
    server: Server = field(default_factory=Server)
    attack: Attack = field(default_factory=Attack)
    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    model: Model = field(default_factory=Model)
    gate: Gate = field(default_factory=Gate)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    engine: Engine = field(default_factory=Engine)


AUGMENTATIONS = {"none": None, "flip": (0, True), "crop": (4, False), "crop-flip": (4, True)}
"""Of `training.augment`: by how many pixels images are shifted at most, and whether half of them are mirrored."""

PARTITIONS = ("pathological", "dirichlet", "iid", "natural")
"""Of `partition.kind`, besides partitioners of flwr-datasets."""

EXPORTS = ("safetensors", "torch.export", "onnx")
"""Formats that a trained client can be exported in."""


def per_round(config: Config) -> int:
    """K, the number of clients in a round."""
    return max(1, round(config.federation.fraction * config.federation.clients))


def trimmed(share: float, clients: int) -> int:
    """How many of a round's clients `server.trim` leaves out on either side."""
    return math.floor(share * clients + 1e-9)  # 0.29 * 100 is 28.999999999999996


NORMS = ("switch", "layer", "batch", "none")
NORM_PRESETS = {"none": "none-none-none", "paper": "switch-batch-batch"}


def gate_norms(norm: str) -> tuple[str, str, str]:
    """The norms of the gate's input, hidden layer and output that `gate.norm` names; UserError where it names none."""
    parts = NORM_PRESETS.get(norm, norm).split("-")
    if len(parts) != 3 or any(part not in NORMS for part in parts):
        presets, norms = ", ".join(NORM_PRESETS), ", ".join(NORMS)
        raise UserError(f'gate.norm is "{norm}", must be {presets}, or three of {norms} joined by "-"')
    return parts[0], parts[1], parts[2]
