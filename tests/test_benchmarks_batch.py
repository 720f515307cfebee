from benchmarks import batch


def test_ratios_are_of_rounds():
    assert batch.over([2.0, 9.0], [4.0, 3.0]) == [0.5, 3.0]


def test_a_row_a_contestant():
    figures = {
        "images_per_s": {"loop, batch 8, 1 decoding": 20.0, "DataLoader, 1 worker": 18.0, "job, 1 actor": 19.0},
        "best_loop": "loop, batch 8, 1 decoding", "best_loader": "DataLoader, 1 worker",
        "over_the_loop": {"DataLoader, 1 worker": 0.9, "job, 1 actor": 0.95},
        "over_the_loader": {"DataLoader, 1 worker": 1.0, "job, 1 actor": 1.056},
        "spread": {"DataLoader, 1 worker": [0.8, 0.92], "job, 1 actor": [0.9, 1.0]},
        "start_s": {"DataLoader, 1 worker": 0.3, "job, 1 actor": 6.0},
    }  # fmt: skip
    assert batch.markdown({"models": {"net": figures}}).splitlines()[2:] == [
        "| net | DataLoader, 1 worker | 18.0 | 0.90 (0.80…0.92) | 1.00 | 0.3 |",
        "| net | job, 1 actor | 19.0 | 0.95 (0.90…1.00) | 1.06 | 6.0 |",
        "| net | loop, batch 8, 1 decoding | 20.0 | 1 | – | – |",
    ]
