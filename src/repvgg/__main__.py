from repvgg.cli import main

main()
