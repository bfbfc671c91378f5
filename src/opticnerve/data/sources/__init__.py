"""Files as records: JSON, CSV, parquet, WebDataset shards, folders, a hub."""
