"""Names of the methods, and whom to cite for them, as model cards have it."""

# How a model was tuned: the fact `method` of a model, see storage/origin.py.
METHODS = {
    "pst": "PST (parameter-efficient sparsity while fine-tuning)",
    "spp": "SPP (sparsity-preserving fine-tuning of a pruned model)",
}
# How it was pruned before: `method` of its fact `pruning`, see pruning/metadata.py.
PRUNERS = {"magnitude": "magnitude pruning", "wanda": "Wanda", "sparsegpt": "SparseGPT", "ria": "RIA"}
CITATIONS = {
    "pst": """@inproceedings{li2022pst,
  title     = {Parameter-Efficient Sparsity for Large Language Models Fine-Tuning},
  author    = {Li, Yuchao and Luo, Fuli and Tan, Chuanqi and Wang, Mengdi and Huang, Songfang and Li, Shen and Bai, Junjie},
  booktitle = {Proceedings of the Thirty-First International Joint Conference on Artificial Intelligence (IJCAI)},
  year      = {2022},
  note      = {arXiv:2205.11005}
}""",  # noqa: E501
    "spp": """@inproceedings{lu2024spp,
  title     = {SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning for Large Language Models},
  author    = {Lu, Xudong and Zhou, Aojun and Xu, Yuhui and Zhang, Renrui and Gao, Peng and Li, Hongsheng},
  booktitle = {Proceedings of the 41st International Conference on Machine Learning (ICML)},
  year      = {2024},
  note      = {arXiv:2405.16057}
}""",
    "magnitude": """@inproceedings{han2015learning,
  title     = {Learning both Weights and Connections for Efficient Neural Networks},
  author    = {Han, Song and Pool, Jeff and Tran, John and Dally, William J.},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2015},
  note      = {arXiv:1506.02626}
}""",
    "wanda": """@inproceedings{sun2024wanda,
  title     = {A Simple and Effective Pruning Approach for Large Language Models},
  author    = {Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2024},
  note      = {arXiv:2306.11695}
}""",
    "sparsegpt": """@inproceedings{frantar2023sparsegpt,
  title     = {SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot},
  author    = {Frantar, Elias and Alistarh, Dan},
  booktitle = {Proceedings of the 40th International Conference on Machine Learning (ICML)},
  year      = {2023},
  note      = {arXiv:2301.00774}
}""",
    "ria": """@inproceedings{zhang2024ria,
  title     = {Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models},
  author    = {Zhang, Yingtao and Bai, Haoli and Lin, Haokun and Zhao, Jialin and Hou, Lu and Cannistraci, Carlo Vittorio},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2024}
}""",  # noqa: E501
}
