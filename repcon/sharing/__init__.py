"""Students, teachers and label stores in repositories of the Hugging Face hub."""
