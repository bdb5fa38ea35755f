"""`python -m peft_sparse`: the command `peft-sparse`, also where its script is not on the path."""

import sys

from peft_sparse.cli.main import main

sys.exit(main())
