"""Repositories of the Hugging Face Hub, through huggingface_hub, which is imported only for such paths."""
