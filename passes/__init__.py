"""Graph passes: each takes a `ModelGraph` and returns it with a `PassResult`.

They know graphs and operators, not models. In the order in which a decoder is routed:
`RemoveNoOps`, `WriteOutComplex`, `CanonicalizeAttention`, `ProveCausal`, `FindLayers`, then for prompts `SeeGroups`,
`PoolBlocks`, `InsertSelection`, `RouteStages`, `RestoreInPlace`, `CarryStates` and `ExposeOutputs`, for the tokens that
follow `NumberStages`, `AttendToCache` and, for GPUs, `FoldHeads`; `ExposeStreams` last, where hidden states are asked
for. On the vision tower `FindStates`, `CanonicalizeAttention`, and `ReduceFeatures` for pictures of one size,
`ReduceGrids` for those of any.
"""

from .. import kernels  # noqa: F401 - it registers torch.ops.reroute
from .attend_to_cache import AttendToCache
from .base_errors import MatchError, RerouteError
from .base_pass import Pass, PassResult, Rejection
from .canonicalize_attention import CanonicalizeAttention
from .carry_states import CarryStates
from .expose_outputs import ExposeOutputs
from .expose_streams import ExposeStreams
from .find_layers import FindLayers
from .find_states import FindStates
from .fold_heads import FoldHeads
from .insert_selection import SCORING, InsertSelection
from .model_graph import Decision, Layer, LayerSizes, ModelGraph, Reach
from .number_stages import NumberStages
from .pool_blocks import PoolBlocks
from .prove_causal import ProveCausal
from .ranking import Candidates, Rank, attention_scores, by_attention, fields_asked
from .reduce_features import GONE, Reduce, ReduceFeatures, TowerStates
from .reduce_grids import GridInputs, GridStates, ReduceGrid, ReduceGrids
from .remove_no_ops import RemoveNoOps
from .restore_in_place import RestoreInPlace
from .route_stages import ACTIONS, POSITIONS, RouteStages
from .run_passes import DUMP_VARIABLE, edit_graph, run_passes, to_program
from .see_groups import SeeGroups
from .write_out_complex import WriteOutComplex

__all__ = [
    "ACTIONS",
    "DUMP_VARIABLE",
    "GONE",
    "POSITIONS",
    "SCORING",
    "AttendToCache",
    "Candidates",
    "CanonicalizeAttention",
    "CarryStates",
    "Decision",
    "ExposeOutputs",
    "ExposeStreams",
    "FindLayers",
    "FindStates",
    "FoldHeads",
    "GridInputs",
    "GridStates",
    "InsertSelection",
    "Layer",
    "LayerSizes",
    "MatchError",
    "ModelGraph",
    "NumberStages",
    "Pass",
    "PassResult",
    "PoolBlocks",
    "ProveCausal",
    "Rank",
    "Reach",
    "Reduce",
    "ReduceFeatures",
    "ReduceGrid",
    "ReduceGrids",
    "Rejection",
    "RemoveNoOps",
    "RerouteError",
    "RestoreInPlace",
    "RouteStages",
    "SeeGroups",
    "TowerStates",
    "WriteOutComplex",
    "attention_scores",
    "by_attention",
    "edit_graph",
    "fields_asked",
    "run_passes",
    "to_program",
]
