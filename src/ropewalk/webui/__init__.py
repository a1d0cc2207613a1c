"""text-generation-webui's extension, and how it gets into a webui's folder and out again."""
