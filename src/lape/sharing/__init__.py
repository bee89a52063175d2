"""Models for others: as safetensors with their configuration, on the Hub, and as ONNX or torch.export files.

Imports nothing of analysis, studies, report and cli.
"""
