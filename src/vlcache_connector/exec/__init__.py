"""How a plan is carried out on one rank: transfers, re-positioning and the recompute pass. Torch, but no vLLM
imports.
"""
