"""Graph passes: each takes a `DecoderGraph` and returns it with a `PassResult`.

They know graphs and operators, not models. In the order in which a decoder is routed:
`RemoveNoOps`, `CanonicalizeAttention`, `ProveCausal`, `FindLayers`, then for prompts `InsertSelection`,
`RouteStages`, `ReuseKeys`, `RestoreInPlace` and `ExposeOutputs`, for the tokens that follow `NumberStages` and
`AttendToCache`; `ExposeStreams` last, where hidden states are asked for. On the vision tower `FindStates`,
`CanonicalizeAttention`, and `ReduceFeatures` for pictures of one size, `ReduceGrids` for those of any.
"""

from .. import kernels  # noqa: F401 - it registers torch.ops.reroute
from .attend_to_cache import AttendToCache
from .canonicalize_attention import CanonicalizeAttention
from .decoder_graph import Decision, DecoderGraph, Layer, LayerSizes
from .errors import MatchError, RerouteError
from .expose_outputs import ExposeOutputs
from .expose_streams import ExposeStreams
from .find_layers import FindLayers
from .find_states import FindStates
from .insert_selection import SCORING, InsertSelection
from .interface import Pass, PassResult, Rejection
from .number_stages import NumberStages
from .pipeline import DUMP_VARIABLE, run_passes, to_program
from .prove_causal import ProveCausal
from .ranking import Candidates, Rank, by_attention
from .reduce_features import GONE, Reduce, ReduceFeatures, TowerStates
from .reduce_grids import GridInputs, GridStates, ReduceGrid, ReduceGrids
from .remove_no_ops import RemoveNoOps
from .restore_in_place import RestoreInPlace
from .reuse_keys import ReuseKeys
from .route_stages import ACTIONS, POSITIONS, RouteStages

__all__ = [
    "ACTIONS",
    "DUMP_VARIABLE",
    "GONE",
    "POSITIONS",
    "SCORING",
    "AttendToCache",
    "Candidates",
    "CanonicalizeAttention",
    "Decision",
    "DecoderGraph",
    "ExposeOutputs",
    "ExposeStreams",
    "FindLayers",
    "FindStates",
    "GridInputs",
    "GridStates",
    "InsertSelection",
    "Layer",
    "LayerSizes",
    "MatchError",
    "NumberStages",
    "Pass",
    "PassResult",
    "ProveCausal",
    "Rank",
    "Reduce",
    "ReduceFeatures",
    "ReduceGrid",
    "ReduceGrids",
    "Rejection",
    "RemoveNoOps",
    "RerouteError",
    "RestoreInPlace",
    "ReuseKeys",
    "RouteStages",
    "TowerStates",
    "by_attention",
    "run_passes",
    "to_program",
]
