"""Long work of projects: fine-tuning jobs as rows, and who works on them. It knows no HTTP and no torch."""
