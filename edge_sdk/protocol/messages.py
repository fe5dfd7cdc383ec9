"""The messages between device and coordinator, as docs/protocol.md describes them.

A message is one msgpack map with a "type" key (codec.py); unknown fields are refused, so every
change of a message raises PROTOCOL. Every number has a range and every text a length, and no text
may break a line: what a peer sends ends up in logs. A `Part` is followed by one raw frame."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

from edge_sdk.helpers.text import one_line
from edge_sdk.protocol.fields import (
    ITEM_BYTES,
    MAX_LINE,
    MAX_OUTPUTS,
    Adapters,
    Bound,
    Bytes,
    ClientId,
    Count,
    CurveKey,
    Digest,
    Distill,
    Dtype,
    Factor,
    Figure,
    Index,
    Input,
    InputShape,
    JobId,
    JobInHand,
    Line,
    Name,
    Option,
    Role,
    Scaler,
    Seconds,
    Share,
    Struct,
    Task,
    Text,
    Vocabulary,
)

PROTOCOL = 8
MAX_FRAME_BYTES = 1024 * 1024  # any frame as it is on the network; ZMQ_MAXMSGSIZE
MAX_TENSORS = 10_000


class ModelSpec(Struct, frozen=True, kw_only=True):
    """Enough to build a multi-exit model: the exit is a cut, the width a ratio of channels, the
    rank the share of its rank that a convolution after the first stage keeps, as two factors.
    task: what outputs mean. vocabulary: how many token ids the int64 inputs are of, 0: float32."""

    family: Name
    input_shape: InputShape  # (C, H, W), (C, window), (F,), or (T,) of token ids
    num_classes: Annotated[int, Meta(ge=1, le=MAX_OUTPUTS)]  # K, outputs of every exit
    exit: Annotated[int, Meta(ge=1, le=100)]
    width: Annotated[float, Meta(gt=0, le=1)] = 1.0
    rank: Annotated[float, Meta(gt=0, le=1)] = 1.0
    task: Task = "classify"
    vocabulary: Vocabulary = 0
    adapters: Adapters | None = None
    options: Annotated[dict[Name, Option], Meta(max_length=50)] = msgspec.field(
        default_factory=dict
    )


class Segment(Struct, frozen=True, kw_only=True):
    """Stages first..last trained together by their exits' joint loss; those before are frozen."""

    first: Annotated[int, Meta(ge=1, le=100)]
    last: Annotated[int, Meta(ge=1, le=100)]


class Prune(Struct, frozen=True, kw_only=True):
    """Of a client whose received model answers at least `threshold` of its held-out examples right
    and still has more than `target` of its weights: in each layer the `share` of those left that
    are smallest goes, and the rest begins again from the initial values (LotteryFL)."""

    share: Annotated[float, Meta(gt=0, lt=1)]
    target: Annotated[float, Meta(gt=0, le=1)]
    threshold: Share = 0.5


class Teacher(Struct, frozen=True, kw_only=True):
    """A second model, which comes with the job and teaches as it came: the loss is (1 - weight) of
    the labels' and weight * temperature^2 of the distance to its answers. is_trained: a copy of it
    is trained on the labels too, and returned."""

    model: ModelSpec
    weight: Share
    temperature: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    is_trained: bool = False


class Plan(Struct, frozen=True, kw_only=True):
    """Local training as data. exit_weights () means all ones; a segment whose exits all weigh 0 is
    trained as if they weighed 1.

    distill_weight is that of the round: a ramp over rounds is the coordinator's, which sends every
    round's weight, and in Welcome's plan the largest. micro_batch and recompute save memory: a
    device lowers the one or sets the other by itself where a job would not fit without, and says so
    in its update."""

    segments: Annotated[tuple[Segment, ...], Meta(min_length=1, max_length=100)]
    epochs: Annotated[int, Meta(ge=1, le=100_000)] = 1
    batch_size: Annotated[int, Meta(ge=2, le=1_000_000)] = 32
    micro_batch: Annotated[int, Meta(ge=0, le=1_000_000)] = 0  # most at once; 0: the whole batch
    recompute: bool = False  # keep stages' inputs only, run them again for their gradients
    lr: Annotated[float, Meta(gt=0, le=10**6)] = 1e-3
    optimizer: Literal["sgd", "adam"] = "adam"
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # sgd only
    weight_decay: Factor = 0.0  # L2 term added to the gradient
    exit_weights: Annotated[tuple[Factor, ...], Meta(max_length=100)] = ()
    prox_mu: Factor = 0.0  # FedProx: mu/2 |w - w_received|^2
    distill: Distill = "none"  # between the exits of a segment, see losses.distillation
    distill_weight: Factor = 0.0
    distill_temperature: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    clip_norm: Factor = 0.0  # the most of a step's gradient, over all tensors; 0: not clipped
    clip_value: Factor = 0.0  # and of each entry of it
    logit_adjustment: Factor = 0.0  # of the client's own class frequencies, in training only
    mask_absent: bool = False  # classes without an example here are no part of the loss
    correction: bool = False  # SCAFFOLD's control variates
    dyn_alpha: Factor = 0.0  # FedDyn's regulariser
    static_norm: bool = False  # BatchNorm by the batch; its statistics by one pass at the end
    scaler: Scaler = "none"  # when layers of a narrow model have their outputs divided by its width
    prune: Prune | None = None
    flat: bool = False  # parameters travel as one vector, statistics of BatchNorm stay here
    teacher: Teacher | None = None
    frozen: Annotated[tuple[Name, ...], Meta(max_length=100)] = ()  # see is_frozen
    holdout: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # share of the examples, never trained on
    seed: Annotated[int, Meta(ge=0, lt=2**62)] = 0

    @property
    def keeps_state(self) -> bool:
        """Whether a device keeps tensors from one round to the next."""
        return bool(self.correction or self.dyn_alpha or self.prune or self.flat)


class TensorSpec(Struct, frozen=True, kw_only=True):
    """One tensor of a transfer; its bytes lie at the next multiple of ALIGNMENT in the stream.

    digest: of its bytes, where a job brings the same in every round: whoever keeps those need not
    ask for them again."""

    name: Name
    shape: Annotated[tuple[Count, ...], Meta(max_length=8)]
    dtype: Dtype
    role: Role = "weight"
    digest: Digest | None = None

    @property
    def num_bytes(self) -> int:
        count = ITEM_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


Specs: TypeAlias = Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_TENSORS)]


class Phase(Struct, frozen=True, kw_only=True):
    """Time of one phase: wall clock and CPU seconds of the processes doing it."""

    wall_s: Seconds
    cpu_s: Seconds | None = None  # None: not measured


class ExitResult(Struct, frozen=True, kw_only=True):
    """Loss and metric, by the task, of one exit on the local training data, last epoch.

    A loss that is not finite says that training diverged: it gets through here, so that the
    coordinator can refuse the update by name (coordinator: fleet/open_job.check_update)."""

    exit: Index
    loss: float
    metric: Figure


class Holdout(Struct, frozen=True, kw_only=True):
    """What the model as received makes, at its last exit, of the examples that were set aside."""

    num_examples: Index
    loss: float
    metric: Figure


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device as measured, or as an emulated board's profile file says.

    memory_available_bytes is what a trainer process may use in all (its runtime included): the
    least of what the host, the cgroup and the user's cap leave; `memory_bound` names which.
    gflops is sustained float32 forward+backward throughput in 1e9 operations per second on all
    `cores`; 0: not measured. layer_s is what a layer costs per training step beside its arithmetic,
    which is most of what a very small model takes. cpu_scale, for an emulated board only, is board
    seconds per CPU second of this host. The ranges are checked when a profile is decoded, not when
    it is made here.
    """

    platform: Text  # "raspberry-pi-4", "jetson-nano", else "generic"
    board: Text = ""  # model string as the board gives it
    machine: Text = ""  # "aarch64", "x86_64"
    memory_total_bytes: Bytes
    memory_available_bytes: Bytes
    memory_bound: Bound = "host"
    cores: Annotated[float, Meta(gt=0, le=4096)]
    gflops: Annotated[float, Meta(ge=0, le=10**9)]
    layer_s: Annotated[float, Meta(ge=0, le=10**3)] = 0.0
    # None: not known, transfers are left out of predictions
    link_mbit_s: Annotated[float, Meta(gt=0, le=10**6)] | None = None
    is_emulated: bool = False
    cpu_scale: Annotated[float, Meta(gt=0, le=10**9)] | None = None


class InputScaling(Struct, frozen=True, kw_only=True):
    """How the inputs of some data came to be: integer / divisor - offset, or, where divisor is
    None, floats as they were given. low, high: the smallest and the largest input. made_of: what
    they are, in words that are the same for inputs that mean the same; "": not known."""

    low: Input
    high: Input
    divisor: Annotated[float, Meta(gt=0, le=10**9)] | None = None
    offset: Annotated[float, Meta(ge=-(10**9), le=10**9)] = 0.0
    made_of: Text = ""


class Hello(Struct, frozen=True, kw_only=True, tag="hello"):
    """Device to coordinator, first message of every connection."""

    protocol: int
    client_id: ClientId
    session: Name  # new with every start of the agent
    profile: DeviceProfile
    num_examples: Index
    input_shape: InputShape
    num_classes: Index  # as in ModelSpec, of these data
    task: Task = "classify"
    vocabulary: Vocabulary = 0
    scaling: InputScaling | None = None  # None: not known, nothing is compared
    class_names: Digest | None = None  # of the names in the order of the labels; None: not known
    round: JobInHand = 0
    job: JobId | None = None  # in hand: a coordinator that was restarted goes on with it
    software: Name = "edge-sdk"


class Welcome(Struct, frozen=True, kw_only=True, tag="welcome"):
    """Coordinator to device: the whole model, the training it will be asked for, the deadline.

    variants: models to choose among, cheapest first, each trained as one segment up to its exit;
    (): the model, cut at any exit."""

    protocol: int
    run: Name
    model: ModelSpec  # exit = the deepest that exists
    plan: Plan
    deadline_s: Seconds  # 0: none
    heartbeat_s: Annotated[float, Meta(gt=0, le=3600)]
    variants: Annotated[tuple[ModelSpec, ...], Meta(max_length=100)] = ()
    scaling: InputScaling | None = None  # of the test set, or of the run's first device
    class_names: Digest | None = None


class Ready(Struct, frozen=True, kw_only=True, tag="ready"):
    """Device to coordinator: the deepest exit it can train (0: none), the deeper stages it could
    train alone over a frozen prefix, and those of them for which a round also leaves time beside
    the prefix. Sent again when the choice changes.

    variant: the place, from 1, of the welcome's variant that it has chosen, whose exit `exit` is;
    0: none was offered, or none fits. num_weights: how many parameters the model has that it trains
    for a plan of flat weights, which may be its own."""

    exit: Annotated[int, Meta(ge=0, le=100)]
    variant: Annotated[int, Meta(ge=0, le=100)] = 0
    num_weights: Count = 0
    stages: Annotated[tuple[Index, ...], Meta(max_length=100)] = ()
    prefix_s: Seconds = 0.0  # predicted for the job of the prefix; 0: not known
    stage_s: Annotated[tuple[Seconds, ...], Meta(max_length=100)] = ()  # of each of `stages`, or ()
    reason: Line = ""  # what limits it; may be an error's text, so it is made one Line here

    def __post_init__(self) -> None:
        force_setattr(self, "reason", one_line(self.reason, MAX_LINE))


class Job(Struct, frozen=True, kw_only=True, tag="job"):
    """Coordinator to device: train this. `tensors` is the full list of what will travel.

    id: of run, round, client and all of this message, so a job that is given again, also by a
    coordinator that was restarted, is recognised."""

    id: JobId
    round: Index
    model: ModelSpec
    plan: Plan
    tensors: Specs
    deadline_s: Seconds


class Fetch(Struct, frozen=True, kw_only=True, tag="fetch"):
    """Receiver to sender: I have `have` parts of this round's transfer; send me first ..
    first + count - 1. count 0: nothing is lacking any more."""

    round: Index
    have: Count
    first: Count
    count: Annotated[int, Meta(ge=0, le=1024)]


class Part(Struct, frozen=True, kw_only=True, tag="part"):
    """One part; one raw frame with its bytes follows."""

    round: Index
    index: Count


class Update(Struct, frozen=True, kw_only=True, tag="update"):
    """Device to coordinator: a finished job; its tensors are fetched with Fetch.

    digest: of the tensors' bytes, compared when all are here: memory and disks of devices err. An
    update is told again after a reconnect; the same job and digest are the same update, which
    counts once."""

    job: JobId
    digest: Digest
    round: Index
    num_examples: Index
    num_steps: Count
    exits: Annotated[tuple[ExitResult, ...], Meta(max_length=100)]
    phases: dict[Literal["wait", "download", "load", "train"], Phase]
    peak_memory_bytes: Count
    micro_batch: Count = 0  # of the plan as it was trained
    recompute: bool = False
    retries: Count = 0
    holdout: Holdout | None = None
    state_round: JobInHand = (
        0  # of the tensors kept here that training began from; 0: there were none
    )
    tensors: Specs


class Accepted(Struct, frozen=True, kw_only=True, tag="accepted"):
    """Coordinator to device: the update arrived whole and counts."""

    round: Index


class Fault(Struct, frozen=True, kw_only=True, tag="fault"):
    """Either way: something went wrong, by its name in errors.py. round 0: not about a round.

    `detail` is often the text of a foreign error, so it is made one Line here."""

    code: Name
    detail: Line
    round: JobInHand = 0

    def __post_init__(self) -> None:
        force_setattr(self, "detail", one_line(self.detail, MAX_LINE))


class Heartbeat(Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """Device to coordinator every heartbeat_s, and the coordinator's answer to it."""

    round: JobInHand = 0


class Probe(Struct, frozen=True, kw_only=True, tag="probe"):
    """Coordinator to device: are you there? Another device says that it has your name. Answered
    with a Heartbeat at once."""


class Bye(Struct, frozen=True, kw_only=True, tag="bye"):
    """Either way: a clean end. is_final: the coordinator's run is over, it will not come back."""

    is_final: bool = False
    reason: Line = ""


class Join(Struct, frozen=True, kw_only=True, tag="join"):
    """Device to coordinator, on a connection of its own: admit client_id with this public key. Sent
    under an invitation's key, or under the client's present one to replace that."""

    client_id: ClientId
    public_key: CurveKey


class Joined(Struct, frozen=True, kw_only=True, tag="joined"):
    """Coordinator to device: the key that `join` named is admitted, under this name."""

    client_id: ClientId


ToCoordinator: TypeAlias = Hello | Ready | Update | Join
ToDevice: TypeAlias = Welcome | Job | Accepted | Probe | Joined
EitherWay: TypeAlias = Fetch | Part | Fault | Heartbeat | Bye
Message: TypeAlias = ToCoordinator | ToDevice | EitherWay
