"""What is learned: a file for each kind of task, with its loss, its measure, its settings, its models and its pictures.

Imports nothing of training and what stands on it. A kind of task is added by a file here, a line in `KINDS`, and the
titles of its measures in `measures`.
"""

from collections.abc import Mapping
from types import MappingProxyType

# What learns from which kind of set (`lape.data.sources.PictureSource.kind`), loaded when it is asked for.
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "classes": "lape.tasks.classification:ClassificationWork",
        "instances": "lape.tasks.detection:DetectionWork",
        "maps": "lape.tasks.segmentation:SegmentationWork",
    }
)
