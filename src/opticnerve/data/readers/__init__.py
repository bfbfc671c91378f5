"""Data files → conversations: captions, questions and answers, LLaVA's JSON, chat messages, `datasets` folders.

`records` splits a file into records and remembers where each stood; one module a format turns a record into
conversations; `rules` says which conversations can be learned from; `read` puts the three together.
"""

from opticnerve.data.readers.read import FORMATS, DataSource, read, read_all

__all__ = ["FORMATS", "DataSource", "read", "read_all"]
