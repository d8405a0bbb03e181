//! What a document has between its fences, so that tests run what people read.

use anyhow::{Context, Result};

/// The fenced blocks of a page in Markdown that bear this label, in order.
pub fn blocks<'page>(page: &'page str, label: &str) -> Vec<&'page str> {
    let opening = format!("\n```{label}\n");
    let mut blocks = Vec::new();
    let mut rest = page;
    while let Some((_, after)) = rest.split_once(&opening) {
        let Some((block, after)) = after.split_once("\n```\n") else {
            break;
        };
        blocks.push(block);
        rest = after;
    }
    blocks
}

/// The one block of that label.
pub fn block<'page>(page: &'page str, label: &str) -> Result<&'page str> {
    match blocks(page, label)[..] {
        [block] => Ok(block),
        ref others => Err(anyhow::anyhow!("{} blocks", others.len())),
    }
    .with_context(|| format!("the page is to have one block of {label}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_by_their_labels() {
        let page = "text\n```sh\none\ntwo\n```\n\n```xml\n<a/>\n```\n```sh\nthree\n```\nend\n";
        assert_eq!(blocks(page, "sh"), ["one\ntwo", "three"]);
        assert_eq!(block(page, "xml").ok(), Some("<a/>"));
        assert!(block(page, "sh").is_err() && block(page, "toml").is_err());
        assert!(blocks("\n```sh\nnever closed", "sh").is_empty());
    }
}
