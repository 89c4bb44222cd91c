"""What members take, and what fits where: told from configs and headers, before anything is loaded."""
