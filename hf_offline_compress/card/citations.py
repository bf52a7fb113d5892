"""BibTeX of the methods that recipes and structures refer to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..structures import STRUCTURES

REVISITING = "2302.04045"
DIRECTION = "2106.08181"

# What a reference has in it → its BibTeX.
BIBTEX = {
    REVISITING: """@inproceedings{banaei2023revisiting,
  title = {Revisiting Offline Compression: Going Beyond Factorization-based Methods for Transformer Language Models},
  author = {Banaei, Mohammadreza and Ba{\\l}azy, Klaudia and Kasymov, Artur and Lebret, R{\\'e}mi and Tabor, Jacek and
    Aberer, Karl},
  booktitle = {Findings of the Association for Computational Linguistics: EACL 2023},
  year = {2023},
  eprint = {2302.04045},
  archivePrefix = {arXiv}
}""",
    DIRECTION: """@inproceedings{balazy2021direction,
  title = {Direction is what you need: Improving Word Embedding Compression in Large Language Models},
  author = {Ba{\\l}azy, Klaudia and Banaei, Mohammadreza and Lebret, R{\\'e}mi and Tabor, Jacek and Aberer, Karl},
  booktitle = {Proceedings of the 6th Workshop on Representation Learning for NLP (RepL4NLP-2021)},
  year = {2021},
  eprint = {2106.08181},
  archivePrefix = {arXiv}
}""",
    "Random Features for Large-Scale Kernel Machines": """@inproceedings{rahimi2007random,
  title = {Random Features for Large-Scale Kernel Machines},
  author = {Rahimi, Ali and Recht, Benjamin},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2007}
}""",
    "Martens & Grosse": """@inproceedings{martens2015optimizing,
  title = {Optimizing Neural Networks with Kronecker-factored Approximate Curvature},
  author = {Martens, James and Grosse, Roger},
  booktitle = {Proceedings of the 32nd International Conference on Machine Learning},
  year = {2015}
}""",
    "DRONE": """@inproceedings{chen2021drone,
  title = {{DRONE}: Data-aware Low-rank Compression for Large {NLP} Models},
  author = {Chen, Patrick H. and Yu, Hsiang-Fu and Dhillon, Inderjit S. and Hsieh, Cho-Jui},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021}
}""",
    "SVD-LLM": """@inproceedings{wang2025svdllm,
  title = {{SVD-LLM}: Truncation-aware Singular Value Decomposition for Large Language Model Compression},
  author = {Wang, Xin and Zheng, Yu and Wan, Zhongwei and Zhang, Mi},
  booktitle = {International Conference on Learning Representations},
  year = {2025}
}""",
    "QuantEase": """@misc{behdin2023quantease,
  title = {{QuantEase}: Optimization-based Quantization for Language Models},
  author = {Behdin, Kayhan and Acharya, Ayan and Gupta, Aman and Song, Qingquan and Zhu, Siyu and Keerthi, Sathiya and
    Mazumder, Rahul},
  year = {2023},
  eprint = {2309.01885},
  archivePrefix = {arXiv}
}""",
    "GPTVQ": """@misc{vanbaalen2024gptvq,
  title = {{GPTVQ}: The Blessing of Dimensionality for {LLM} Quantization},
  author = {van Baalen, Mart and Kuzmin, Andrey and Nagel, Markus and others},
  year = {2024}
}""",
    "QTIP": """@inproceedings{tseng2024qtip,
  title = {{QTIP}: Quantization with Trellises and Incoherence Processing},
  author = {Tseng, Albert and Sun, Qingyao and Hou, David and De Sa, Christopher},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}
}""",
    "GPTQ": """@inproceedings{frantar2023gptq,
  title = {{GPTQ}: Accurate Post-Training Quantization for Generative Pre-trained Transformers},
  author = {Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, Dan},
  booktitle = {International Conference on Learning Representations},
  year = {2023}
}""",
    "weighted low-rank factorization": """@inproceedings{hsu2022language,
  title = {Language model compression with weighted low-rank factorization},
  author = {Hsu, Yen-Chang and Hua, Ting and Chang, Sung-En and Lou, Qian and Shen, Yilin and Jin, Hongxia},
  booktitle = {International Conference on Learning Representations},
  year = {2022}
}""",
    "Van Loan & Pitsianis": """@incollection{vanloan1993approximation,
  title = {Approximation with {K}ronecker Products},
  author = {Van Loan, Charles F. and Pitsianis, Nikos},
  booktitle = {Linear Algebra for Large Scale and Real-Time Applications},
  year = {1993}
}""",
    "Han et al., Learning both": """@inproceedings{han2015learning,
  title = {Learning both Weights and Connections for Efficient Neural Networks},
  author = {Han, Song and Pool, Jeff and Tran, John and Dally, William J.},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2015}
}""",
    "Q8BERT": """@inproceedings{zafrir2019q8bert,
  title = {{Q8BERT}: Quantized 8Bit {BERT}},
  author = {Zafrir, Ofir and Boudoukh, Guy and Izsak, Peter and Wasserblat, Moshe},
  booktitle = {Workshop on Energy Efficient Machine Learning and Cognitive Computing at NeurIPS},
  year = {2019}
}""",
    "Eckart & Young": """@article{eckart1936approximation,
  title = {The approximation of one matrix by another of lower rank},
  author = {Eckart, Carl and Young, Gale},
  journal = {Psychometrika},
  year = {1936}
}""",
    "Tucker, Some mathematical notes": """@article{tucker1966some,
  title = {Some mathematical notes on three-mode factor analysis},
  author = {Tucker, Ledyard R.},
  journal = {Psychometrika},
  year = {1966}
}""",
    "De Lathauwer": """@article{delathauwer2000best,
  title = {On the best rank-1 and rank-({R}1, {R}2, ..., {RN}) approximation of higher-order tensors},
  author = {De Lathauwer, Lieven and De Moor, Bart and Vandewalle, Joos},
  journal = {SIAM Journal on Matrix Analysis and Applications},
  year = {2000}
}""",
}


def citations(report: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the BibTeX entries of the methods that were used, and references that there is no entry for.

    They are those of the recipe and of the structures of the groups. Autoencoders come from two papers; both are cited.
    """
    used = dict.fromkeys(group["structure"] for group in report["groups"])
    references = list(report["recipe"].get("references") or [])
    references += [STRUCTURES[name].reference for name in used if name in STRUCTURES]
    if "autoencoder" in used:
        references += [REVISITING, DIRECTION]
    return _entries(dict.fromkeys(references))


def _entries(references: Iterable[str]) -> tuple[list[str], list[str]]:
    found: dict[str, str] = {}
    unknown = []
    for reference in references:
        mark = next((mark for mark in BIBTEX if mark.lower() in reference.lower()), None)
        if mark is None:
            unknown.append(reference)
        else:
            found.setdefault(mark, BIBTEX[mark])
    return list(found.values()), unknown
