"""The leaderboard: every method on the same pruned checkpoint, with the same data, budget and seeds.

    python -m benchmarks.leaderboard                          # every part, the default budget
    python -m benchmarks.leaderboard --part causal-lm --workers 2
    python -m benchmarks.leaderboard --part causal-lm --cases "wanda 2:4" --rows spp masked_lora --seeds 0 1 2
    python -m benchmarks.leaderboard --render                 # only the tables and charts of what is there

The rules, which hold for every row:

* A row's learning rate is searched with the same number of tries, on a validation part of the training data; the test
  set is read only by the final runs. Where a row has two rates (weights and scores), the tries are shared by both.
* Every seed draws the training batches alike for all rows, and the pruned checkpoint is one folder on disk that all
  rows load; its fingerprint is written down with each result.
* After merging, `verify_sparsity` counts the zeros lost, and the outputs are compared with those before the merge.

What was measured lies in a store (`--store`), a JSON line for each run; a run that is there is not repeated, so the
command can be stopped and started again, and several processes may work on one store. Tables, CSVs and charts are made
from it into benchmarks/results/leaderboard, and `overview.md`, which has all tables side by side. Where a README.md
there has tables of who wins, they are counted anew.
"""
