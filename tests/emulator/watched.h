#pragma once

// Whether ThreadSanitizer sees every access: then a run takes some ten times as long, and what threads do,
// unlike what they come to, is alike for many sizes and values. So it is watched for some of them.
#ifdef __SANITIZE_THREAD__
constexpr bool watched = true;
#else
constexpr bool watched = false;
#endif
