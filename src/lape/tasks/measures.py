"""What results are called: the names under which they are kept, and those that people read. All are in percent."""

from collections.abc import Mapping

TITLES: Mapping[str, str] = {
    "val_accuracy": "accuracy",
    "val_box_ap": "box AP",
    "val_mask_ap": "mask AP",
    "val_miou": "mIoU",
    "val_pixel_accuracy": "pixel accuracy",
}
