"""The models of the paper and small ones, a file a family; `registry` adds their names to timm's.

Imports nothing of recipes, tasks, training and what stands on them. Empty on purpose: `import lape` loads no torch.
"""
