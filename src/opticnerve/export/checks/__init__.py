"""Programs that run an exported folder in its own engine. They are started by path, import nothing of opticnerve
(but for the check of opticnerve's own folders), read a job as JSON, and write what the engine said."""
