"""The front door: each command parses its arguments, calls the library and prints. One file per group of commands.

    peft-sparse                       prune, finetune, merge, evaluate, report, verify, pack, unpack (main.py)
    python -m peft_sparse.cli.demo    prune, tune, merge and verify real models (`make demo`)

What a command needs besides the library lies next to it in files whose name starts with an underscore.
"""
