"""Datasets and transforms: the only room that opens images."""

# By name; any other data is a folder.
SETS = (
    *("digits", "fashion-mnist", "cifar10", "cifar100", "imagenet"),
    *("coco", "ade20k", "shapes-detection", "shapes-segmentation"),
)
