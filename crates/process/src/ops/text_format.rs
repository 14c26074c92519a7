//! Prometheus' own text format (0.0.4) out of OpenMetrics, for scrapers and tools that do not know the latter.
//!
//! The samples are the same; only the comments differ: a counter's family is named with its `_total`, units and the
//! end mark have no place, and what OpenMetrics calls `unknown` is `untyped`.

/// Rewrites one page.
pub(super) fn from_openmetrics(page: &str) -> String {
    let mut text = String::with_capacity(page.len());
    // HELP comes before TYPE, and only TYPE tells a counter.
    let mut help = None;
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let suffix = if kind == "counter" { "_total" } else { "" };
            let kind = if kind == "unknown" { "untyped" } else { kind };
            if let Some((_, help)) = help.take().filter(|(of, _)| *of == name) {
                text.push_str(&format!("# HELP {name}{suffix} {help}\n"));
            }
            text.push_str(&format!("# TYPE {name}{suffix} {kind}\n"));
        } else if !line.starts_with('#') {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_named_with_their_suffix_and_only_comments_change() {
        let openmetrics = "# HELP calls Calls of a b.\n# TYPE calls counter\ncalls_total{a=\"# x\"} 7\n\
                           # HELP age_seconds Age.\n# TYPE age_seconds gauge\n# UNIT age_seconds seconds\n\
                           age_seconds -1\n# EOF\n";
        let text = "# HELP calls_total Calls of a b.\n# TYPE calls_total counter\ncalls_total{a=\"# x\"} 7\n\
                    # HELP age_seconds Age.\n# TYPE age_seconds gauge\nage_seconds -1\n";
        assert_eq!(from_openmetrics(openmetrics), text);
    }
}
