"""The pages, and the program that draws their pictures: not part of the package."""
