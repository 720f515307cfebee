"""CSP networks under torchvision's FPN detectors: train, evaluate on COCO. Start at `models.py`."""
