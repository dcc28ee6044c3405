"""A Hugging Face encoder in, a task's model and its predictions out; the encoder also serves embedding and scoring."""
