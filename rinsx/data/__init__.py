"""Data for models of language and of images: from a corpus to batches that are the same on every run.

A corpus goes through five steps, each a function or a class.

1. A *source* yields documents: [`rinsx.data.stdlib`][], [`rinsx.data.text`][], [`rinsx.data.jsonl`][],
    [`rinsx.data.parquet`][], [`rinsx.data.huggingface`][], [`rinsx.data.documents`][].
2. A *tokeniser* turns text into integers: [`rinsx.data.Bytes`][], [`rinsx.data.BPE`][].
3. [`rinsx.data.tokenize`][] does that once, into a file that is mapped into memory. [`rinsx.data.split`][] holds a part out.
4. [`rinsx.data.Windows`][] cuts the tokens into rows; [`rinsx.data.mix`][] mixes corpora.
5. [`rinsx.data.batches`][] and [`rinsx.data.evaluation`][] are `grain` datasets of batches.

!!! example

    ```python
    import rinsx as rx

    tokens = rx.data.tokenize(rx.data.stdlib(), rx.data.Bytes())
    train, validation = rx.data.split(tokens, "1/20")
    for batch in rx.data.batches(rx.data.Windows(train, 128), 4):
        print(batch["tokens"].shape)
        break
    ```

Images go another way, of four steps: a source of rows with random access, such as [`rinsx.data.digits`][] or
[`rinsx.data.image_parquet`][]; [`rinsx.data.Pixels`][] and [`rinsx.data.Captions`][], which say what becomes of image and text;
[`rinsx.data.Pairs`][], which puts these together; and the same `split`, `mix`, `batches` and `evaluation`.

It needs `pip install 'rinsx[train]'`, and for images `pip install 'rinsx[train,vision]'`.
"""

from ._captions import Captions as Captions
from ._digits import digits as digits
from ._hub import huggingface as huggingface
from ._image_folder import image_folder as image_folder
from ._image_tables import image_huggingface as image_huggingface, image_parquet as image_parquet
from ._image_tar import image_tar as image_tar
from ._image_texts import all_captions as all_captions, captions_of as captions_of
from ._images import AbstractImages as AbstractImages, Example as Example
from ._loader import batches as batches, evaluation as evaluation
from ._mixture import mix as mix
from ._pairs import Pairs as Pairs
from ._pixels import Pixels as Pixels
from ._records import jsonl as jsonl, parquet as parquet
from ._sources import AbstractSource as AbstractSource, documents as documents, text as text
from ._split import split as split
from ._stdlib import stdlib as stdlib
from ._tokenize import tokenize as tokenize
from ._tokenizers import AbstractTokenizer as AbstractTokenizer, BPE as BPE, Bytes as Bytes
from ._tokens import Tokens as Tokens
from ._windows import Windows as Windows


__all__ = [
    "AbstractImages",
    "AbstractSource",
    "AbstractTokenizer",
    "BPE",
    "Bytes",
    "Captions",
    "Example",
    "Pairs",
    "Pixels",
    "Tokens",
    "Windows",
    "all_captions",
    "batches",
    "captions_of",
    "digits",
    "documents",
    "evaluation",
    "huggingface",
    "image_folder",
    "image_huggingface",
    "image_parquet",
    "image_tar",
    "jsonl",
    "mix",
    "parquet",
    "split",
    "stdlib",
    "text",
    "tokenize",
]
