"""Scripts that the interpreter with vLLM runs; they import nothing of servefit.

They have a folder of their own because Python puts a script's folder first on its path, and in
the folder above our `vllm.py` would hide vLLM itself.
"""
