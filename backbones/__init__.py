"""CSP networks as ImageNet classifiers: build, load weights, train, evaluate. Start at `cspnet.py`."""
