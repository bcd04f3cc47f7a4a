"""The modules of train_lm.py and train_tp.py.

settings    the command line                         data        text -> token ids -> windows
processes   ranks, devices, signals                  model       the transformer
losses      npu_xent's, and PyTorch's                optimizer   AdamW and its learning rate
checkpoint  saving and resuming                      report      metrics, summary, plot
"""
