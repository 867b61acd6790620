from ds_pretrain.cli import main

main()
