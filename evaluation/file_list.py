"""The files and folders that each benchmark needs below --folder (evaluate.py --list). A folder ends with "/"."""

from evaluation.benchmarks import BENCHMARKS

FILES = {
    "vqav2": "v2_OpenEnded_mscoco_val2014_questions.json v2_mscoco_val2014_annotations.json val2014/",
    "vqav2-testdev": "v2_OpenEnded_mscoco_test-dev2015_questions.json test2015/",
    "okvqa": "OpenEnded_mscoco_val2014_questions.json mscoco_val2014_annotations.json val2014/",
    "textvqa": "TextVQA_0.5.1_val.json train_images/",
    "vizwiz": "val/ val.json (or in Annotations/)",
    "vizwiz-test": "test/ test.json (or in Annotations/)",
    "gqa": "testdev_balanced_questions.json images/",
    "easy-vqa": "test/questions.json test/images/",
    "coco": "dataset_coco.json val2014/",
    "flickr30k": "dataset_flickr30k.json flickr30k-images/",
    "mmbench": "mmbench_dev_en_20231003.tsv",
    "mmbench-cn": "mmbench_dev_cn_20231003.tsv",
    "mmbench-test": "mmbench_test_en_20231003.tsv",
    "mmbench-test-cn": "mmbench_test_cn_20231003.tsv",
    "mmbench-v11": "MMBench_DEV_EN_V11.tsv",
    "mmbench-v11-cn": "MMBench_DEV_CN_V11.tsv",
    "mmbench-v11-test": "MMBench_TEST_EN_V11.tsv",
    "mmbench-v11-test-cn": "MMBench_TEST_CN_V11.tsv",
    "seed": "SEED-Bench.json SEED-Bench-image/",
    "scienceqa": "problems.json pid_splits.json images/test/",
    "qbench": "llvisionqa_dev.json images/",
    "qbench-test": "llvisionqa_test.json images/",
    "mme": "CATEGORY/*.txt CATEGORY/*.jpg (or CATEGORY/questions_answers_YN/ and CATEGORY/images/), for all 14 categories",
    "pope": "coco_pope_random.json coco_pope_popular.json coco_pope_adversarial.json val2014/",
    "mmlu": "dev/*_dev.csv test/*_test.csv",
    "arc-c": "ARC-Challenge/ARC-Challenge-Test.jsonl",
    "arc-e": "ARC-Easy/ARC-Easy-Test.jsonl",
    "owleval": "questions.jsonl cases/",
}


def list_files() -> str:
    """Returns a paragraph per benchmark: name, title, the files it needs, and where they are published."""
    return "\n\n".join(
        f"{name}: {benchmark.title}\n  files  {FILES[name]}\n  from   {benchmark.url}"
        for name, benchmark in BENCHMARKS.items()
    )
