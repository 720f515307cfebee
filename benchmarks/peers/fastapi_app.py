"""FastAPI on uvicorn: a plain function, which runs in the thread pool, on as many workers as there are cores."""

from typing import Annotated, Any

from fastapi import FastAPI, File
from picture import Model, prepare

app = FastAPI()
model = Model(1)


@app.post("/classify")
def classify(image: Annotated[bytes, File()]) -> dict[str, Any]:
    return model.top5([prepare(image)])[0]
