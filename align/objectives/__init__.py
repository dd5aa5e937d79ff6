"""Objectives: one file a paper. Importing them here is the registry: a config may name them without a path."""

from align.objectives.awm import AWM
from align.objectives.b2_diffurl import B2DiffuRL
from align.objectives.d3po import D3PO
from align.objectives.dgpo import DGPO
from align.objectives.direct_reward import DirectReward
from align.objectives.dpo import DPO
from align.objectives.find import FIND
from align.objectives.kto import KTO
from align.objectives.nft import NFT
from align.objectives.objective import Context, Cost, Metrics, Needs, Objective
from align.objectives.opd import OPD
from align.objectives.policy_gradient import PolicyGradient
from align.objectives.reno import ReNO

__all__ = [
    "AWM",
    "D3PO",
    "DGPO",
    "DPO",
    "FIND",
    "KTO",
    "NFT",
    "OPD",
    "B2DiffuRL",
    "Context",
    "Cost",
    "DirectReward",
    "Metrics",
    "Needs",
    "Objective",
    "PolicyGradient",
    "ReNO",
]
