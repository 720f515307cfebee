#!/usr/bin/env bash
# What a detector finds in a picture, as JSON; and the picture with its boxes:
#   bash client.sh IMAGE [URL] [MODEL]
set -euo pipefail
image=$1 url=${2:-http://127.0.0.1:8000} model=${3:-detector}

# The picture as the body. --fail-with-body makes a refusal an exit status and still shows what the server says.
curl --silent --show-error --fail-with-body --data-binary @"$image" \
    "$url/v2/models/$model/detect?score_threshold=0.5"

# The same as a form, answered by a picture
curl --silent --show-error --fail-with-body --form image=@"$image" --output annotated.png \
    "$url/v2/models/$model/detect?score_threshold=0.5&annotate=png"
