//! Text in columns: how wide it is, and how it is made to fit.

/// How many columns a text takes.
pub(super) fn length(text: &str) -> usize {
    text.chars().count()
}

/// The text in at most `width` columns.
pub(super) fn shorten(text: &str, width: usize) -> String {
    if length(text) <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    format!("{}…", kept.trim_end())
}

/// The text in lines of at most `width` columns, broken at spaces; a word that is longer stays whole.
pub(super) fn fold(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if length(line) + 1 + length(word) <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// As much of the text as a terminal of `height` lines shows without scrolling, and `hint` where that is not all.
pub(super) fn fit(text: &str, height: usize, hint: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    // The last line of a terminal is where the cursor stands.
    let room = height.saturating_sub(1).max(1);
    if lines.len() <= room {
        return text.to_owned();
    }
    let kept = room.saturating_sub(1);
    let more = lines.len() - kept;
    let kept = lines.get(..kept).unwrap_or_default().join("\n");
    format!("{kept}\n… {more} more lines: {hint}\n")
}
