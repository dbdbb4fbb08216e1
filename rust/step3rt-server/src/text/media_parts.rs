//! Finds images, videos and sounds among the parts of messages.

use serde_json::Value;

/// What common protocols call such parts.
const MEDIA: [&str; 11] = [
    "image",
    "image_url",
    "input_image",
    "video",
    "video_url",
    "input_video",
    "audio",
    "audio_url",
    "input_audio",
    "file",
    "input_file",
];

/// The type of the first part of a message's content that is no text.
pub fn first_media_part(messages: &[Value]) -> Option<&'static str> {
    let contents = messages.iter().filter_map(|message| message.get("content"));
    let parts = contents.flat_map(|content| match content {
        Value::Array(parts) => parts.as_slice(),
        single => std::slice::from_ref(single),
    });
    let mut types = parts.filter_map(|part| part.get("type")?.as_str());
    types.find_map(|asked| MEDIA.into_iter().find(|kind| *kind == asked))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn media_are_found_wherever_they_are_and_text_is_none() {
        for (content, expected) in [
            (json!("an image"), None),
            (json!(null), None),
            (json!({"value": "image"}), None),
            (
                json!([{"type": "text", "text": "image"}, "image", {"type": ["image"]}]),
                None,
            ),
            (json!({"type": "image"}), Some("image")),
            (
                json!([{"text": "what is this?"}, {"type": "image_url"}]),
                Some("image_url"),
            ),
        ] {
            let messages = [json!({"role": "user"}), json!({"content": content})];
            assert_eq!(first_media_part(&messages), expected, "{messages:?}");
        }
        assert_eq!(first_media_part(&[json!(1), json!("image")]), None);
    }
}
