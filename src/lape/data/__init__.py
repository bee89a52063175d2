"""Datasets and transforms: the only room that opens images."""

SETS = ("digits", "fashion-mnist", "cifar10", "cifar100", "imagenet")  # by name; any other data is a folder of images
