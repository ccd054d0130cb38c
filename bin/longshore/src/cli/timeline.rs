//! `timeline`: what each step of a pod's start took, as a waterfall.
//!
//! ```text
//! RunPodSandbox           |#########               |    45.2 ms
//!   network               |##                      |     3.1 ms
//! StartContainer web      |           ####         |    20.0 ms
//! ```
//!
//! What lies far apart in time (a restart an hour later) is drawn in a section of
//! its own, each to its own scale.

use super::args::TimelineArgs;
use super::client::Answer;
use super::output::{print, print_json, shown_id, to_json, width};
use super::{Context, find};
use proto::admin::{Span, TimelineRequest, TimelineResponse};
use std::time::{SystemTime, UNIX_EPOCH};
use types::Result;

/// A pause longer than this, in nanoseconds, begins a new section.
const PAUSE: i64 = 2_000_000_000;
/// The narrowest bar that is drawn, in columns.
const NARROWEST_BAR: usize = 10;

/// Draws a pod's timeline.
pub async fn timeline(context: &Context, args: &TimelineArgs) -> Result<()> {
    let mut client = context.connect().await?;
    let pod = find::pod(&mut client, &args.pod).await?;
    let answer = client.admin.timeline(TimelineRequest { pod: pod.id }).await;
    let answer = answer.answer(|| format!("ask for the timeline of pod {}", args.pod))?;
    if context.json() {
        return print_json(&to_json("longshore.admin.v1.TimelineResponse", &answer)?);
    }
    let utf8 = ["LC_ALL", "LC_CTYPE", "LANG"]
        .iter()
        .find_map(|v| std::env::var(v).ok().filter(|v| !v.is_empty()))
        .is_some_and(|v| v.to_ascii_lowercase().replace('-', "").contains("utf8"));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
    print(&draw(answer, width(), now, if utf8 { '█' } else { '#' }))
}

/// A span with its end; what still runs ends now.
struct Bar {
    label: String,
    from: i64,
    to: i64,
    note: String,
}

fn bar(span: &Span, now: i64) -> Bar {
    let runs = span.duration < 0;
    let to = if runs { now.max(span.started_at) } else { span.started_at.saturating_add(span.duration) };
    let mut label = if span.step.is_empty() { span.operation.clone() } else { format!("  {}", span.step) };
    if span.step.is_empty() && !span.container.is_empty() {
        label = format!("{label} {}", span.container);
    }
    let mut note = String::new();
    if runs {
        note.push_str("  still runs");
    }
    if !span.error.is_empty() {
        let text: String = span.error.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        note = format!("{note}  failed: {text}");
    }
    Bar { label, from: span.started_at, to, note }
}

/// Sorts the spans so that each operation is followed by its steps. Steps whose
/// operation was not timed, or was forgotten, get one that spans them.
fn ordered(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_by_key(|s| (s.started_at, !s.step.is_empty()));
    let mut groups: Vec<Vec<Span>> = Vec::new();
    for span in spans {
        let own = |group: &&mut Vec<Span>| {
            let head = &group[0];
            let inside = head.duration < 0 || span.started_at <= head.started_at.saturating_add(head.duration);
            let alike = head.operation == span.operation && head.container == span.container;
            // A repeated step belongs to the next attempt.
            let new = group.iter().all(|s| s.step != span.step);
            alike && if head.step.is_empty() { inside } else { new }
        };
        match groups.iter_mut().rev().find(own) {
            Some(group) if !span.step.is_empty() => group.push(span),
            _ => groups.push(vec![span]),
        }
    }
    groups.into_iter().flat_map(headed).collect()
}

/// A group with its operation first.
fn headed(mut group: Vec<Span>) -> Vec<Span> {
    if !group[0].step.is_empty() {
        let end = |s: &Span| if s.duration < 0 { None } else { Some(s.started_at.saturating_add(s.duration)) };
        let from = group[0].started_at;
        let to: Option<Vec<i64>> = group.iter().map(end).collect();
        let duration = to.map_or(-1, |ends| ends.into_iter().max().unwrap_or(from) - from);
        let operation = Span { step: String::new(), error: String::new(), duration, ..group[0].clone() };
        group.insert(0, operation);
    }
    group
}

#[allow(clippy::cast_precision_loss, reason = "milliseconds with one digit are shown")]
fn milliseconds(nanoseconds: i64) -> String {
    format!("{:.1} ms", nanoseconds.max(0) as f64 / 1e6)
}

/// A section's distance from the first: in seconds where milliseconds are noise.
fn offset(nanoseconds: i64) -> String {
    if nanoseconds < 10_000_000_000 { milliseconds(nanoseconds) } else { format!("{} s", nanoseconds / 1_000_000_000) }
}

/// The whole picture, for a terminal of `width` columns.
fn draw(answer: TimelineResponse, width: usize, now: i64, block: char) -> String {
    let head = format!("Pod {} ({})", answer.pod_name, shown_id(&answer.pod_id, false));
    let bars: Vec<Bar> = ordered(answer.spans).iter().map(|s| bar(s, now)).collect();
    let Some(first) = bars.first() else { return format!("{head}: no step was timed\n") };
    let (zero, mut text) = (first.from, format!("{head}\n"));
    let label = bars.iter().map(|b| b.label.chars().count()).max().unwrap_or(0);
    let figure = bars.iter().map(|b| milliseconds(b.to - b.from).len()).max().unwrap_or(0);
    let columns = width.saturating_sub(label + figure + 6).max(NARROWEST_BAR);
    for section in sections(&bars) {
        let from = section.iter().map(|b| b.from).min().unwrap_or(zero);
        let to = section.iter().map(|b| b.to).max().unwrap_or(from);
        text.push_str(&format!("\n+{}: {} in all\n", offset(from - zero), milliseconds(to - from)));
        for b in section {
            let drawn = scaled(b, from, to, columns, block);
            let took = milliseconds(b.to - b.from);
            text.push_str(&format!("{:<label$}  |{drawn}| {took:>figure$}{}\n", b.label, b.note));
        }
    }
    text
}

/// Cuts the bars where nothing ran for longer than [`PAUSE`].
fn sections(bars: &[Bar]) -> Vec<&[Bar]> {
    let (mut cut, mut begin, mut busy_until) = (Vec::new(), 0, i64::MIN);
    for (i, b) in bars.iter().enumerate() {
        if i > begin && b.from > busy_until.saturating_add(PAUSE) {
            cut.push(&bars[begin..i]);
            begin = i;
        }
        busy_until = busy_until.max(b.to);
    }
    cut.push(&bars[begin..]);
    cut
}

/// One bar in its place, at least one column wide.
fn scaled(b: &Bar, from: i64, to: i64, columns: usize, block: char) -> String {
    let whole = i128::from(to - from).max(1);
    let wide = i128::try_from(columns).unwrap_or(0);
    let at = |t: i64| usize::try_from(i128::from(t - from) * wide / whole).unwrap_or(0).min(columns);
    let begin = at(b.from).min(columns - 1);
    let end = at(b.to).max(begin + 1);
    let part = |c: char, n: usize| std::iter::repeat_n(c, n);
    part(' ', begin).chain(part(block, end - begin)).chain(part(' ', columns - end)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(operation: &str, step: &str, container: &str, from_ms: i64, ms: i64) -> Span {
        Span {
            operation: operation.into(),
            step: step.into(),
            container: container.into(),
            started_at: from_ms * 1_000_000,
            duration: if ms < 0 { -1 } else { ms * 1_000_000 },
            error: String::new(),
        }
    }

    fn picture(spans: Vec<Span>, width: usize) -> String {
        let answer = TimelineResponse { pod_id: "ab".repeat(32), pod_name: "web".into(), spans };
        draw(answer, width, 200_000_000, '#')
    }

    #[test]
    fn steps_stand_below_their_operation_in_their_place() {
        let text = picture(
            vec![
                span("RunPodSandbox", "", "", 0, 50),
                span("StartContainer", "", "a", 50, 50),
                span("RunPodSandbox", "network", "", 25, 25),
            ],
            46,
        );
        let want = "Pod web (ababababababa)\n\
                    \n+0.0 ms: 100.0 ms in all\n\
                    RunPodSandbox     |######      |  50.0 ms\n\
                    \x20\x20network         |   ###      |  25.0 ms\n\
                    StartContainer a  |      ######|  50.0 ms\n";
        // Widths follow from 46 columns: 16 of labels, 7 of figures, 6 of frame.
        let squeeze = |t: &str| t.split_whitespace().collect::<Vec<_>>().join(" ");
        let squeezed_bars = |t: &str| t.lines().map(|l| l.matches('#').count()).collect::<Vec<_>>();
        assert_eq!(text.lines().count(), want.lines().count(), "{text}");
        assert!(squeeze(&text).starts_with(&squeeze("Pod web (ababababababa) +0.0 ms: 100.0 ms in all")), "{text}");
        let bars = squeezed_bars(&text);
        assert!(bars[3].abs_diff(bars[5]) <= 1 && bars[4] * 2 <= bars[3] + 1, "{text}");
        assert!(text.lines().all(|l| l.chars().count() <= 46), "{text}");
    }

    #[test]
    fn steps_without_their_operation_get_one() {
        let text = picture(
            vec![
                span("CreateContainer", "", "a", 0, 10),
                span("StartContainer", "create", "a", 10, 30),
                span("StartContainer", "start", "a", 40, 10),
                span("StartContainer", "create", "b", 20, 5),
                span("StartContainer", "create", "a", 60, 5),
            ],
            80,
        );
        let heads: Vec<&str> = text.lines().filter(|l| l.starts_with("Start")).collect();
        assert_eq!(heads.len(), 3, "{text}");
        assert!(heads[0].starts_with("StartContainer a") && heads[0].ends_with("40.0 ms"), "{text}");
        assert!(heads[1].starts_with("StartContainer b"), "{text}");
    }

    #[test]
    fn a_late_restart_has_a_section_of_its_own() {
        let text = picture(vec![span("A", "", "", 0, 10), span("B", "", "c", 3_600_000, 10)], 80);
        assert!(text.contains("\n+3600 s: 10.0 ms in all\n"), "{text}");
        let bar_of = |name: &str| text.lines().find(|l| l.starts_with(name)).unwrap().matches('#').count();
        assert_eq!(bar_of("A"), bar_of("B c"));
    }

    #[test]
    fn errors_and_open_spans_are_told_and_nothing_escapes() {
        let mut failed = span("A", "x", "", 0, 0);
        failed.error = "no \x1b[31mshim".into();
        let text = picture(vec![span("A", "", "", 0, -1), failed], 20);
        assert!(text.contains("200.0 ms  still runs"), "{text}");
        assert!(text.contains("failed: no  [31mshim"), "{text}");
        assert!(picture(vec![], 80).contains("no step was timed"));
        // Times that no clock gives draw something and don't panic.
        picture(vec![span("A", "", "", i64::MAX / 1_000_001, 5), span("B", "y", "", 0, 1)], 3);
    }
}
