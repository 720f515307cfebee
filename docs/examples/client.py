"""What a detector finds in pictures, a line a box: python client.py IMAGE… [--url URL] [--model NAME]"""

import argparse

from serving.client import Client

parser = argparse.ArgumentParser()
parser.add_argument("images", nargs="+")
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--model", default="detector")
args = parser.parse_args()

with Client(args.url) as client:  # keeps its connections, and tries again while the server is busy or restarts
    answers = client.detect_many(args.model, args.images, score_threshold=0.5)
    for path, answer in zip(args.images, answers, strict=True):
        for found in answer["detections"]:
            corners = " ".join(f"{value:.1f}" for value in found["box"])  # x1, y1, x2, y2 in the picture's pixels
            print(f"{path}: {found['label']} {found['score']:.2f} at {corners}")
